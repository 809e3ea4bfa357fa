"""The interface and helpers that the readers of weight files share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cartridges_jax.errors import UserError

Index = tuple[slice, ...]


class TensorFile(Protocol):
    """Named tensors on disk, read one at a time, whole or in part.

    `gguf.GGUFFile` and `safetensors_files.SafetensorsDirectory` are two.
    """

    @property
    def tensor_names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, row-major: a linear layer's weight is [out, in]."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Tensor `name`, or the part of it that `index` selects, as an array of its own.

        Args:
          index: a slice of step 1 for each of the leading axes; None is the whole tensor. Values out of
            range are clipped, as numpy does.
        """

    def sha256(self) -> str:
        """A hash that changes when the weights do, in hex; a file that changed is read whole."""


def full_index(index: Index | None, shape: tuple[int, ...]) -> Index:
    """`index` with one slice per axis of `shape`, each with a start and a stop inside the axis.

    Raises:
      ValueError: more slices than axes, or a step other than 1.
    """
    given = index or ()
    if len(given) > len(shape):
        raise ValueError(f"{len(given)} slices for a tensor of shape {shape}")
    ranges = [part.indices(size) for part, size in zip(given, shape)]
    if any(step != 1 for _, _, step in ranges):
        raise ValueError(f"only slices of step 1 can be read, not {given}")
    within = [slice(start, max(start, stop)) for start, stop, _ in ranges]
    return (*within, *(slice(0, size) for size in shape[len(given) :]))


def tensor_named(name: str, tensors: Mapping[str, Any], path: Path) -> Any:
    """A file's entry for tensor `name`.

    Raises:
      UserError: there is no such tensor.
    """
    if name not in tensors:
        raise UserError(f"{path}: no tensor named {name!r}; `tensor_names` lists the {len(tensors)} there are")
    return tensors[name]


def sha256_of_file(path: str | Path) -> str:
    """The SHA-256 of a file, in hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
