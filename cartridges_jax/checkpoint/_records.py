"""Checksums of JSON records, of arrays and of files."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cartridges_jax.errors import one_line


class Damaged(Exception):
    """The files on disk are incomplete or differ from what was written."""


def in_short(error: Exception) -> str:
    """An exception of orbax or tensorstore, whose messages fill pages, in one short line."""
    return one_line(error)[:160]


# --- Records -----------------------------------------------------------------------------


def seal(record: dict) -> dict:
    """The record, as JSON returns it, with its own checksum."""
    record = json.loads(json.dumps(record))
    return {**record, "sha256": _sha256_of_json(record)}


def unseal(sealed: Any) -> dict:
    """The record that `seal` was given.

    Raises:
      Damaged: it does not match its checksum.
    """
    if not isinstance(sealed, dict) or "sha256" not in sealed:
        raise Damaged("its record has no checksum")
    record = {name: value for name, value in sealed.items() if name != "sha256"}
    if _sha256_of_json(record) != sealed["sha256"]:
        raise Damaged("its record does not match its checksum")
    return record


def read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise Damaged(f"{path.name} is not JSON: {in_short(error)}") from error


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- Arrays ------------------------------------------------------------------------------


def describe(arrays: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """name -> {shape, dtype, sha256}, for `verify_arrays`."""
    return {
        name: {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "sha256": _sha256_of_array(array),
        }
        for name, array in arrays.items()
    }


def verify_arrays(arrays: Mapping[str, np.ndarray], described: Mapping[str, dict]) -> None:
    for name, found in describe(arrays).items():
        if found != described[name]:
            raise Damaged(f"array {name} does not match its checksum")


def empty_like(described: Mapping[str, dict]) -> dict[str, np.ndarray]:
    return {n: np.empty(d["shape"], jnp.dtype(d["dtype"])) for n, d in described.items()}


def stored(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that are written: orbax refuses those without elements."""
    return {name: array for name, array in arrays.items() if array.size}


def _sha256_of_array(array: np.ndarray) -> str:
    # As uint8: hashlib does not take buffers of bfloat16 and similar types.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


# --- Files -------------------------------------------------------------------------------


def file_checksums(root: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below `root`, by its path relative to it."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def verify_files(root: pathlib.Path, checksums: Mapping[str, str]) -> None:
    found = file_checksums(root)
    for name, checksum in checksums.items():
        if name not in found:
            raise Damaged(f"{root.name}/{name} is missing")
        if found[name] != checksum:
            raise Damaged(f"{root.name}/{name} does not match its checksum")
