"""Reading Hugging Face model directories: config.json and safetensors weights, in one file or in shards.

Opening a directory finds everything that can be wrong with its files: it reads the headers of all weight
files and checks them against the index. Only `read` touches the weights themselves.
No pickle (`pytorch_model.bin`) is ever read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cartridges_jax.errors import UserError, one_line
from cartridges_jax.formats.cache import cached_sha256
from cartridges_jax.formats.tensors import Index, full_index, tensor_named

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_GENERATION_FILE = "generation_config.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin", "*.pt", "*.pth")
# By safetensors' names. Importing ml_dtypes also lets safetensors itself make bfloat16 arrays.
_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
_FETCH_AGAIN = "fetch or convert the model again"


class SafetensorsDirectory:
    """A directory with `config.json` and `model.safetensors`, or shards with their index.

    The weight files stay memory-mapped while the object lives; the system can drop their pages.

    Attributes:
      path: the directory.
      config: the content of config.json.
      generation_config: the content of generation_config.json, or None if there is none.
      tensor_names: the names of the tensors, sorted.

    Raises:
      UserError: a file is missing, damaged or not JSON; the index and the shards disagree, or the index
        names anything but a file next to it; a tensor is stored in a dtype other than BF16, F16 or F32.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such directory; check the path")
        self.config: dict[str, Any] = read_json(self.path / CONFIG_FILE)
        generation = self.path / _GENERATION_FILE
        self.generation_config: dict[str, Any] | None = read_json(generation) if generation.is_file() else None

        # As in transformers, the one file is preferred where both are there.
        listed = None if (self.path / WEIGHTS_FILE).is_file() else _shards_in_index(self.path)
        self._files = [self.path / name for name in sorted(set(listed.values()) if listed else {WEIGHTS_FILE})]
        self._tensors: dict[str, Any] = {}  # safetensors' lazy slices
        self._owner: dict[str, Path] = {}
        for file in self._files:
            self._add(file)
        if listed is not None:
            self._require_agreement(listed)
        for name, tensor in self._tensors.items():
            if tensor.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{self._owner[name]}: tensor {name!r} is stored as {tensor.get_dtype()}; "
                    f"convert the model to one of {', '.join(_DTYPES)}"
                )

    @property
    def tensor_names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, row-major: a linear layer's weight is [out, in]."""
        return tuple(tensor_named(name, self._tensors, self.path).get_shape())

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Tensor `name`, or the part of it that `index` selects, in the stored dtype.

        Args:
          index: as in `tensors.TensorFile.read`; only the selected part is brought into memory.

        Raises:
          UserError: there is no such tensor.
        """
        tensor = tensor_named(name, self._tensors, self.path)
        selected = full_index(index, self.shape(name))
        shape = [part.stop - part.start for part in selected]
        if 0 in shape:  # safetensors refuses an empty slice at an axis' end
            return np.empty(shape, _DTYPES[tensor.get_dtype()])
        return tensor[selected] if shape else tensor[...]

    def sha256(self) -> str:
        """A hash over config.json and the weight files, in hex.

        It is what `sha256sum config.json FILES | sha256sum` prints there, FILES in alphabetical order.
        The files' hashes are remembered from an earlier start (see `cache.cached_sha256`).
        """
        lines = [f"{cached_sha256(file)}  {file.name}\n" for file in [self.path / CONFIG_FILE, *self._files]]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _add(self, file: Path) -> None:
        opened = _open(file)
        for name in opened.keys():
            if name in self._tensors:
                raise UserError(
                    f"{self.path}: tensor {name!r} is both in {self._owner[name].name} and in {file.name}; {_FETCH_AGAIN}"
                )
            self._tensors[name] = opened.get_slice(name)
            self._owner[name] = file

    def _require_agreement(self, listed: Mapping[str, str]) -> None:
        """Refuses an index and shards that do not hold the same tensors."""
        for name, shard in listed.items():
            if name not in self._owner or self._owner[name].name != shard:
                raise UserError(f"{self.path / INDEX_FILE}: tensor {name!r} is not in {shard}; {_FETCH_AGAIN}")
        for name in self._tensors:
            if name not in listed:
                raise UserError(
                    f"{self._owner[name]}: tensor {name!r} is not in {INDEX_FILE}; the files belong to different "
                    f"models, {_FETCH_AGAIN}"
                )


def _shards_in_index(directory: Path) -> dict[str, str]:
    """The index's table from tensor names to file names, each a file of `directory`."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise UserError(_no_weights(directory))
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{path}: no table 'weight_map' from tensor names to files; {_FETCH_AGAIN}")
    for shard in sorted(set(table.values())):
        # The name decides, not where it leads: the hub's cache links each file into another directory.
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{path}: {shard!r} is not the name of a .safetensors file in the same directory; "
                "the index is wrong, do not use it"
            )
        if not (directory / shard).is_file():
            raise UserError(f"{directory / shard}: missing, but {INDEX_FILE} names it; fetch that file")
    return table


def _no_weights(directory: Path) -> str:
    found = sorted(file.name for file in directory.glob("*.safetensors"))
    if found:
        return (
            f"{directory}: {len(found)} .safetensors files ({found[0]}, …) but neither {WEIGHTS_FILE} "
            f"nor {INDEX_FILE}; fetch the index, or rename a single file to {WEIGHTS_FILE}"
        )
    pickles = sorted({file.name for pattern in _PICKLES for file in directory.glob(pattern)})
    if pickles:
        return (
            f"{directory}: only pickled weights ({pickles[0]}), which are never read because they can run code; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    return f"{directory}: no weights, neither {WEIGHTS_FILE} nor {INDEX_FILE}; fetch them"


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise UserError(
            f"{file}: truncated or damaged safetensors file of {file.stat().st_size:,} bytes "
            f"({one_line(error)}); fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Hugging Face model directory has one, check the path")
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, not an object; fetch it again")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} occurs twice")
    return result
