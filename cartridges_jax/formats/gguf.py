"""Reading GGUF model files: metadata and dequantised tensors.

A thin layer over the `gguf` package (https://github.com/ggml-org/llama.cpp/tree/master/gguf-py) that
gives tensors in numpy's row-major shape and turns every damaged file into one clear error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cartridges_jax.errors import UserError, one_line
from cartridges_jax.formats.cache import cached_sha256
from cartridges_jax.formats.tensors import Index, full_index, tensor_named

_MAGIC = b"GGUF"
# The exceptions of GGUFReader on damaged input; it has no type of its own.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
# The types that gguf.quants.dequantize supports; it does not list them (tests/test_formats.py compares the two).
_DEQUANTISED = frozenset(
    gguf.GGMLQuantizationType[name]
    for name in (
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0",
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
    )
)  # fmt: skip


class GGUFFile:
    """One GGUF file, memory-mapped; tensors are dequantised when they are read.

    Attributes:
      path: the file.
      metadata: key to Python value (str, bool, int, float or list), decoded on first use.
      tensor_names: the names of the tensors, in file order.

    Raises:
      UserError: the file is missing, is not a GGUF, or is truncated or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        reader = _open(self.path)
        self.metadata: Mapping[str, Any] = _Metadata(self.path, reader.fields)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, row-major: a linear layer's weight is [out, in]."""
        # GGUF lists the fastest-varying axis first, numpy last.
        return tuple(int(size) for size in reversed(tensor_named(name, self._tensors, self.path).shape))

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Tensor `name`, or the part of it that `index` selects, dequantised to float32.

        Only the selected rows are dequantised; a slice of the last axis dequantises whole rows first,
        because a quantisation's blocks run along them.

        Args:
          index: as in `tensors.TensorFile.read`.

        Raises:
          UserError: there is no such tensor, or its quantisation is not supported.
        """
        tensor = tensor_named(name, self._tensors, self.path)
        *rows, columns = full_index(index, self.shape(name))
        if tensor.tensor_type not in _DEQUANTISED:
            raise UserError(
                f"{self.path}: tensor {name!r} is stored as {tensor.tensor_type.name}, which cannot be "
                "dequantised; use a file in F32, F16, BF16, Q8_0 or another common quantisation"
            )
        values = gguf.quants.dequantize(np.asarray(tensor.data)[tuple(rows)], tensor.tensor_type)
        # A copy even for float32, so that no array keeps the file mapped.
        return np.array(values[..., columns], dtype=np.float32)

    def sha256(self) -> str:
        """The SHA-256 of the whole file, in hex; remembered from an earlier start (see `cache.cached_sha256`)."""
        return cached_sha256(self.path)


class _Metadata(Mapping):
    """The metadata as a read-only mapping; a vocabulary is decoded on first use."""

    def __init__(self, path: Path, fields: Mapping[str, gguf.ReaderField]):
        self._path = path
        self._fields = fields
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            field = self._fields[key]
            try:
                self._decoded[key] = field.contents()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self._path}: metadata {key!r} is not valid UTF-8; fetch or convert the file again"
                ) from error
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise UserError(f"{path}: no such GGUF file; check the path")
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise UserError(f"{path}: not a GGUF file (it starts with {magic!r}, not {_MAGIC!r}); check the path")
        return gguf.GGUFReader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except _DAMAGE as error:
        if unknown := re.fullmatch(r"(?:np\.uint32\()?(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise UserError(
                f"{path}: unsupported quantisation (type {unknown[1]}); use a file in F16, BF16, Q8_0, Q4_K_M or another "
                "common quantisation"
            ) from error
        size = path.stat().st_size
        raise UserError(
            f"{path}: truncated or damaged GGUF file of {size:,} bytes "
            f"({type(error).__name__}: {one_line(error)}); fetch it again"
        ) from error
