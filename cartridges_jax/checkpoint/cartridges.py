"""A cartridge as a directory: replaced in one piece, read as it was written or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.checkpoint._disk import (
    absolute,
    fsync,
    fsync_tree,
    refuse_if_too_full,
    refusing_if_it_fills_up,
)
from cartridges_jax.checkpoint._processes import alone
from cartridges_jax.checkpoint._records import (
    Damaged,
    describe,
    empty_like,
    file_checksums,
    in_short,
    read_json,
    seal,
    stored,
    unseal,
    verify_arrays,
    verify_files,
)
from cartridges_jax.checkpoint.metadata import CartridgeMetadata, DocumentSource, portable_config
from cartridges_jax.errors import UserError
from cartridges_jax.formats.sources import public_name

FORMAT_VERSION = 2


def _from_version_1(record: dict, arrays: dict) -> tuple[dict, dict]:
    """Version 1 had one text, no hashes but the fingerprint, an array without effect, and the config as it was."""
    unknown = dict(weights_sha256="", tokenizer_sha256="", chat_template_sha256="")
    name, is_local = public_name(record["model_name"])
    migrated = {
        **record,
        **unknown,
        "model_name": name,
        "model_is_local": is_local,
        "documents": [record["corpus"]],
        "config": portable_config(record["config"]),
    }
    return migrated, {name: array for name, array in arrays.items() if name != "group"}


# By an older version: a function from its (record, arrays) to those of the next version.
MIGRATIONS: dict[int, Callable[[dict, dict], tuple[dict, dict]]] = {1: _from_version_1}

RECORD = "cartridge.json"


@dataclasses.dataclass(frozen=True)
class Cartridge:
    """A KV prefix and its identity."""

    prefix: KVPrefix
    metadata: CartridgeMetadata


# --- Saving ------------------------------------------------------------------------------


def require_place_for(directory: str | os.PathLike, run: str | os.PathLike | None = None) -> None:
    """Raises UserError unless a cartridge can be written to `directory`: absent, empty, or a cartridge.

    Args:
      run: a run's directory, which must be another one.
    """
    directory = absolute(directory)
    if run is not None and directory == absolute(run):
        raise UserError(f"{directory} is the run's own directory; choose another directory to save to")
    if directory.exists() and not (directory / RECORD).exists():
        if not directory.is_dir() or any(directory.iterdir()):
            raise UserError(f"{directory} exists and is not a cartridge; choose another directory to save to")


def save_cartridge(directory: str | os.PathLike, prefix: KVPrefix, metadata: CartridgeMetadata) -> None:
    """Writes a cartridge, replacing the one that is there, so that a whole one is always there.

    The new one is written and fsynced beside the old, the old is renamed aside, the new takes
    its place and the old is deleted. After a crash between the two renames `load_cartridge`
    finds the old one under its other name. Two writers of one directory are not supported.

    No file of a saved cartridge holds a path of this machine.

    Args:
      directory: absent, empty, or a cartridge.
      prefix: keys, values [L, K, P, H] of any float dtype; stored bit for bit.
      metadata: `CartridgeMetadata.of(prefix, …)`.

    Raises:
      UserError: values that are not finite, a directory that is something else, a full disk.
      ValueError: metadata of another prefix.
    """
    directory = absolute(directory)
    arrays = _prefix_arrays(prefix)
    _refuse_not_finite(directory, arrays)
    m = metadata
    described_shape = (m.num_layers, m.num_kv_heads, m.num_slots, m.head_dim)
    if described_shape != prefix.keys.shape or m.next_position != int(prefix.next_position):
        raise ValueError(
            f"metadata of keys {described_shape}, next_position {m.next_position} for a prefix of "
            f"keys {prefix.keys.shape}, next_position {int(prefix.next_position)}: build it with "
            "CartridgeMetadata.of"
        )
    require_place_for(directory)
    record = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(metadata),
        "num_frozen": metadata.num_frozen,  # for the human reader
        "arrays": describe(arrays),
    }
    num_bytes = sum(array.nbytes for array in arrays.values())
    refuse_if_too_full(directory, num_bytes)
    fresh = _aside(directory, "saving")
    try:
        with refusing_if_it_fills_up(directory, num_bytes):
            shutil.rmtree(fresh, ignore_errors=True)  # of a save that was killed
            fresh.mkdir(parents=True)
            _write_arrays(fresh / "arrays", arrays)
            record["files"] = file_checksums(fresh / "arrays")
            (fresh / RECORD).write_text(json.dumps(seal(record), indent=2) + "\n")
            fsync_tree(fresh)
            _replace(directory, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _prefix_arrays(prefix: KVPrefix) -> dict[str, np.ndarray]:
    """The prefix's arrays by field name, a bias only where there is one."""
    names = ("keys", "values", "positions", "bias")
    arrays = {name: getattr(prefix, name) for name in names}
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


def _refuse_not_finite(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name in ("keys", "values", "bias"):
        if name not in arrays:
            continue
        bad = ~np.isfinite(arrays[name])
        if name == "bias":
            bad &= arrays[name] != -np.inf  # a slot that is switched off
        if bad.any():
            raise UserError(
                f"{directory}: not saved, {bad.sum()} of {bad.size} {name} are NaN or infinite "
                f"(first in layer {int(np.argwhere(bad)[0][0])}); the training diverged: lower the "
                "learning rate"
            )


def _write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer(multiprocessing_options=alone()) as checkpointer:
        checkpointer.save(path, stored(arrays))
        checkpointer.wait_until_finished()
    # Orbax writes the absolute path into this file, of which it reads nothing but the existence.
    if (mark := path / "commit_success.txt").exists():
        mark.write_text("Checkpoint commit was successful\n")


def _replace(directory: pathlib.Path, fresh: pathlib.Path) -> None:
    """Renames the complete `fresh` to `directory`, which may exist."""
    previous = _aside(directory, "previous")
    if directory.exists():
        # A `previous` beside a `directory` is left by a save that was killed as it cleaned up.
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(directory, previous)
    os.rename(fresh, directory)
    fsync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _aside(directory: pathlib.Path, role: str) -> pathlib.Path:
    """The sibling that holds an unfinished save ("saving") or the old cartridge ("previous")."""
    return directory.with_name(f".{directory.name}.{role}")


# --- Loading -----------------------------------------------------------------------------


def load_cartridge(directory: str | os.PathLike) -> Cartridge:
    """Reads a cartridge; safe while another process replaces it.

    Returns:
      The cartridge, its arrays bit for bit those that were saved, on the default device.

    Raises:
      UserError: no cartridge there, a damaged one, or one of a newer format.
    """
    directory = absolute(directory)
    while True:
        found = _find(directory)
        if found is None:
            raise UserError(
                f"{directory} is not a cartridge (it has no {RECORD}); give the directory that save_cartridge wrote"
            )
        try:
            return _read_cartridge(found[0])
        except (Damaged, FileNotFoundError) as error:
            if _find(directory) == found:  # otherwise a save replaced it meanwhile: read that
                raise UserError(
                    f"the cartridge in {directory} is damaged ({error}); restore it from a copy or train it again"
                ) from error


def _find(directory: pathlib.Path) -> tuple[pathlib.Path, int, int] | None:
    """The directory of the whole cartridge, and the inode and time that tell it from its successor."""
    # The directory twice: a save may rename the new one to it and delete `previous` in between.
    for path in (directory, _aside(directory, "previous"), directory):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = (path / RECORD).stat()
            return path, status.st_ino, status.st_mtime_ns
    return None


def _read_cartridge(directory: pathlib.Path) -> Cartridge:
    sealed = read_json(directory / RECORD)
    version = sealed.get("format_version") if isinstance(sealed, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"the cartridge in {directory} has format version {version}, and this program knows "
            f"versions up to {FORMAT_VERSION}; update cartridges_jax"
        )
    record = unseal(sealed)
    verify_files(directory / "arrays", record["files"])
    arrays = _read_arrays(directory / "arrays", record["arrays"])
    for older in range(version, FORMAT_VERSION):
        if older not in MIGRATIONS:
            raise UserError(
                f"the cartridge in {directory} has format version {version}, which this program no "
                f"longer reads (it writes {FORMAT_VERSION}); train it again"
            )
        record, arrays = MIGRATIONS[older](record, arrays)
    fields = {field.name: record[field.name] for field in dataclasses.fields(CartridgeMetadata)}
    fields["documents"] = tuple(DocumentSource(**document) for document in fields["documents"])
    fields["frozen_slots"] = tuple((start, stop) for start, stop in fields["frozen_slots"])
    metadata = CartridgeMetadata(**fields)
    return Cartridge(prefix=_prefix_of(arrays, metadata.next_position), metadata=metadata)


def _prefix_of(arrays: Mapping[str, np.ndarray], next_position: int) -> KVPrefix:
    """The only place that builds a prefix from stored arrays."""
    fields = {name: jnp.asarray(array) for name, array in arrays.items()}
    return KVPrefix(**fields, next_position=jnp.int32(next_position))


def _read_arrays(path: pathlib.Path, described: Mapping[str, dict]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    arrays = empty_like(described)
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as checkpointer:
            arrays |= checkpointer.restore(path, stored(arrays))
    except Exception as error:  # orbax promises no types for what damage may do
        raise Damaged(f"arrays unreadable: {in_short(error)}") from error
    verify_arrays(arrays, described)
    return arrays
