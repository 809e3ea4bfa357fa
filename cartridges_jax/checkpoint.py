"""Cartridges and train state on disk: orbax arrays beside a checked JSON record.

Orbax does not notice every flipped byte in the arrays' data, and what it then restores is
garbage without an error. So the record holds a SHA-256 of every array, and one of itself,
and nothing is handed out that does not agree with them. Files have checksums too, checked
before orbax opens them: on damage that it does notice, it prints hundreds of lines.

One process: on several hosts, gather the state and call from the first.

    <cartridge>/cartridge.json        format version, model, corpus, config, checksums
    <cartridge>/arrays/               keys, values, positions, group, (bias)
    <checkpoints>/<step>/state/       the train state's leaves by name
    <checkpoints>/<step>/record/      the caller's JSON and the arrays' checksums
    <checkpoints>/<step>/files.json   the files' checksums

The file is longer than most because both kinds share the first third: the record, the
checksums and the refusal of a full disk.
"""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError

# Orbax is imported where it is used: it adds half a second to programs that only read text.

FORMAT_VERSION = 1
# From an older version's (record, arrays) to the next version's, by the older version.
MIGRATIONS: dict[int, Callable[[dict, dict], tuple[dict, dict]]] = {}

RECORD = "cartridge.json"
FILES = "files.json"
PLAIN_POSITIONS = "0..P-1, next_position P"
EXPLICIT_POSITIONS = "explicit: arrays/positions"
_SLACK_BYTES = 1 << 20  # orbax's own files beside the arrays: tens of kilobytes


class _Damaged(Exception):
    """What is on disk is incomplete or is not what was written."""


# --- What both kinds share: checked records and arrays ---------------------------------


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256_of_array(array: np.ndarray) -> str:
    # Through uint8: hashlib does not take the buffers of bfloat16 and its like.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _seal(record: dict) -> dict:
    """The record (as JSON gives it back) with its own checksum."""
    record = json.loads(json.dumps(record))
    return {**record, "sha256": _sha256_of_json(record)}


def _unseal(sealed: Any) -> dict:
    if not isinstance(sealed, dict) or "sha256" not in sealed:
        raise _Damaged("its record has no checksum")
    record = {name: value for name, value in sealed.items() if name != "sha256"}
    if _sha256_of_json(record) != sealed["sha256"]:
        raise _Damaged("its record does not match its checksum")
    return record


def _describe(arrays: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """name -> {shape, dtype, sha256}: what `_verify` holds the arrays against."""
    return {
        name: {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "sha256": _sha256_of_array(array),
        }
        for name, array in arrays.items()
    }


def _stored(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that go to disk: orbax refuses those without elements."""
    return {name: array for name, array in arrays.items() if array.size}


def _empty_like(described: Mapping[str, dict]) -> dict[str, np.ndarray]:
    return {n: np.empty(d["shape"], jnp.dtype(d["dtype"])) for n, d in described.items()}


def _verify(arrays: Mapping[str, np.ndarray], described: Mapping[str, dict]) -> None:
    for name, found in _describe(arrays).items():
        if found != described[name]:
            raise _Damaged(f"array {name} does not match its checksum")


def _file_checksums(root: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below `root`, by its path relative to it."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _verify_files(root: pathlib.Path, checksums: Mapping[str, str]) -> None:
    found = _file_checksums(root)
    for name, checksum in checksums.items():
        if name not in found:
            raise _Damaged(f"{root.name}/{name} is missing")
        if found[name] != checksum:
            raise _Damaged(f"{root.name}/{name} does not match its checksum")


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise _Damaged(f"{path.name} is not JSON: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An exception of orbax or tensorstore, in one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


@contextlib.contextmanager
def _disk_space_for(
    directory: pathlib.Path, num_bytes: int, begun: bool = False
) -> Iterator[None]:
    """Refuses what the disk cannot hold: before writing has begun, or when it is found midway.

    Raises:
      UserError: naming the directory, the bytes needed and the bytes free.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())

    def disk_full() -> UserError:
        free = shutil.disk_usage(existing).free
        return UserError(
            f"{directory}: saving needs {num_bytes / 1e6:.1f} MB and the disk has {free / 1e6:.1f} "
            "MB free (what was saved before is intact); free some space or choose another directory"
        )

    if not begun and shutil.disk_usage(existing).free < num_bytes + _SLACK_BYTES:
        raise disk_full()
    try:
        yield
    except Exception as error:
        # Tensorstore's errors are ValueErrors that carry the system's words and no errno.
        full = {os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)}
        if any(words in str(error) for words in full):
            raise disk_full() from error
        raise


# --- Cartridges --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CorpusSource:
    """The text a cartridge stands for: its name, SHA-256 and length in tokens."""

    name: str
    sha256: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class CartridgeMetadata:
    """What a cartridge belongs to and how it came about. Made by `CartridgeMetadata.of`.

    Attributes:
      model_name: the model it was trained for.
      model_fingerprint: SHA-256 of that model's config and tokenizer.
      num_layers, num_kv_heads, num_slots, head_dim: L, K, P, H of the keys.
      dtype: name of the keys' and values' dtype.
      next_position: position of the first token behind the prefix.
      position_convention: PLAIN_POSITIONS or EXPLICIT_POSITIONS.
      frozen_slots: the slots that did not learn, as half-open ranges.
      corpus: the text it stands for.
      step: the training step at which it was saved.
      config: the full training config, as JSON gives it back.
    """

    model_name: str
    model_fingerprint: str
    num_layers: int
    num_kv_heads: int
    num_slots: int
    head_dim: int
    dtype: str
    next_position: int
    position_convention: str
    frozen_slots: tuple[tuple[int, int], ...]
    corpus: CorpusSource
    step: int
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        prefix: KVPrefix,
        *,
        model_name: str,
        model_fingerprint: str,
        learning_mask: Sequence[bool] | np.ndarray,
        corpus: CorpusSource,
        step: int,
        config: Mapping[str, Any],
    ) -> CartridgeMetadata:
        """The metadata of `prefix`: what can be read off it is, the rest is given.

        Args:
          learning_mask: [P] bool, True where the slot learns.
          config: anything that JSON can hold; tuples come back as lists.

        Raises:
          ValueError: a learning mask of another length than P.
        """
        num_layers, num_kv_heads, num_slots, head_dim = prefix.keys.shape
        learning_mask = np.asarray(learning_mask, bool)
        if learning_mask.shape != (num_slots,):
            raise ValueError(
                f"learning mask of shape {learning_mask.shape} for {num_slots} slots: "
                "give one bool per slot"
            )
        # Where the mask changes, with learning slots imagined at both ends.
        edges = np.flatnonzero(np.diff(np.pad(learning_mask, 1, constant_values=True)))
        plain = prefix.next_position == num_slots and np.array_equal(
            prefix.positions, np.arange(num_slots)
        )
        return cls(
            model_name=model_name,
            model_fingerprint=model_fingerprint,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            num_slots=num_slots,
            head_dim=head_dim,
            dtype=jnp.dtype(prefix.keys.dtype).name,
            next_position=int(prefix.next_position),
            position_convention=PLAIN_POSITIONS if plain else EXPLICIT_POSITIONS,
            frozen_slots=tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2)),
            corpus=corpus,
            step=int(step),
            config=json.loads(json.dumps(dict(config))),
        )

    @property
    def learning_mask(self) -> np.ndarray:
        """[P] bool, True where the slot learns."""
        mask = np.ones((self.num_slots,), bool)
        for start, stop in self.frozen_slots:
            mask[start:stop] = False
        return mask

    @property
    def num_frozen(self) -> int:
        return sum(stop - start for start, stop in self.frozen_slots)


@dataclasses.dataclass(frozen=True)
class Cartridge:
    """A KV prefix and what it belongs to."""

    prefix: KVPrefix
    metadata: CartridgeMetadata


def check_compatible(
    metadata: CartridgeMetadata,
    *,
    model_name: str,
    model_fingerprint: str,
    shape: tuple[int, int, int],
) -> None:
    """Refuses a cartridge in front of a model that it was not trained for.

    The fingerprint decides; a model that was only renamed or moved is the same model.

    Args:
      shape: the model's (L, K, H).

    Raises:
      UserError: another architecture, or another config or tokenizer.
    """
    trained_for = (metadata.num_layers, metadata.num_kv_heads, metadata.head_dim)
    if trained_for != tuple(shape):
        raise UserError(
            f"this cartridge was trained for {metadata.model_name} with (layers, kv heads, head width) "
            f"{trained_for}, and {model_name} has {tuple(shape)}; load {metadata.model_name} or train "
            f"a cartridge for {model_name}"
        )
    if metadata.model_fingerprint != model_fingerprint:
        raise UserError(
            f"this cartridge was trained for {metadata.model_name} (fingerprint "
            f"{metadata.model_fingerprint[:12]}), and {model_name} (fingerprint {model_fingerprint[:12]}) "
            f"differs from it in config or tokenizer; load the model it was trained for or train "
            f"a cartridge for {model_name}"
        )


def save_cartridge(
    directory: str | os.PathLike, prefix: KVPrefix, metadata: CartridgeMetadata
) -> None:
    """Writes a cartridge, replacing the one that is there, so that one is always whole.

    The new one is written and fsynced beside the old, the old is renamed aside, the new takes
    its place and the old goes. After a crash between the two renames `load_cartridge` finds
    the old one where it was put aside. Two writers of one directory are not supported.

    Args:
      directory: absent, empty, or a cartridge.
      prefix: keys, values [L, K, P, H] of any float dtype; kept bit for bit.
      metadata: `CartridgeMetadata.of(prefix, …)`.

    Raises:
      UserError: values that are not finite, a directory that is something else, a full disk.
      ValueError: metadata of another prefix.
    """
    directory = _absolute(directory)
    arrays = _prefix_arrays(prefix)
    _refuse_not_finite(directory, arrays)
    described_shape = (
        metadata.num_layers,
        metadata.num_kv_heads,
        metadata.num_slots,
        metadata.head_dim,
    )
    if described_shape != prefix.keys.shape or metadata.next_position != prefix.next_position:
        raise ValueError(
            f"metadata of keys {described_shape}, next_position {metadata.next_position} for a prefix of "
            f"keys {prefix.keys.shape}, next_position {prefix.next_position}: make it with CartridgeMetadata.of"
        )
    if directory.exists() and not (directory / RECORD).exists():
        if not directory.is_dir() or any(directory.iterdir()):
            raise UserError(
                f"{directory} exists and is not a cartridge; choose another directory to save to"
            )
    record = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(metadata),
        "num_frozen": metadata.num_frozen,  # for the human reader
        "arrays": _describe(arrays),
    }
    fresh, previous = _aside(directory, "saving"), _aside(directory, "previous")
    with _disk_space_for(directory, sum(array.nbytes for array in arrays.values())):
        try:
            shutil.rmtree(fresh, ignore_errors=True)  # of a save that was killed
            fresh.mkdir(parents=True)
            _write_arrays(fresh / "arrays", arrays)
            record["files"] = _file_checksums(fresh / "arrays")
            (fresh / RECORD).write_text(json.dumps(_seal(record), indent=2) + "\n")
            _fsync_tree(fresh)
            _replace(directory, fresh, previous)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def load_cartridge(directory: str | os.PathLike) -> Cartridge:
    """Reads a cartridge; safe while another process replaces it.

    Returns:
      The cartridge, its arrays bit for bit those that were saved, on the default device.

    Raises:
      UserError: no cartridge there, a damaged one, or one of a newer format.
    """
    directory = _absolute(directory)
    while True:
        whole = _whole_cartridge(directory)
        identity = whole and (whole, whole.stat().st_ino)
        try:
            if whole is None:
                raise FileNotFoundError(directory / RECORD)
            return _read_cartridge(whole)
        except FileNotFoundError as error:
            if _still(directory, identity):
                raise UserError(
                    f"{directory} is not a cartridge (it has no {RECORD}); give the directory that "
                    "save_cartridge wrote"
                ) from error
        except _Damaged as error:
            if _still(directory, identity):
                raise UserError(
                    f"the cartridge in {directory} is damaged ({error}); restore it from a copy or "
                    "train it again"
                ) from error


def _absolute(directory: str | os.PathLike) -> pathlib.Path:
    # Links are followed: it is the directory behind one that is replaced.
    return pathlib.Path(directory).expanduser().resolve()


def _aside(directory: pathlib.Path, role: str) -> pathlib.Path:
    """The sibling in which a save prepares ("saving") or keeps the old one ("previous")."""
    return directory.with_name(f".{directory.name}.{role}")


def _replace(directory: pathlib.Path, fresh: pathlib.Path, previous: pathlib.Path) -> None:
    """Puts the whole `fresh` in the place of `directory`, which may be absent."""
    if directory.exists():
        # A `previous` beside a `directory` is of a save that was killed as it cleaned up.
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(directory, previous)
    os.rename(fresh, directory)
    _fsync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _whole_cartridge(directory: pathlib.Path) -> pathlib.Path | None:
    for path in (directory, _aside(directory, "previous")):
        if (path / RECORD).is_file():
            return path
    return None


def _still(directory: pathlib.Path, identity: tuple[pathlib.Path, int] | None) -> bool:
    """False if a save replaced the cartridge while it was read: then read again."""
    whole = _whole_cartridge(directory)
    with contextlib.suppress(FileNotFoundError):
        return identity == (whole and (whole, whole.stat().st_ino))
    return False


def _read_cartridge(directory: pathlib.Path) -> Cartridge:
    sealed = _read_json(directory / RECORD)
    version = sealed.get("format_version") if isinstance(sealed, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"the cartridge in {directory} has format version {version}, and this program knows versions up "
            f"to {FORMAT_VERSION}; update cartridges_jax"
        )
    record = _unseal(sealed)
    _verify_files(directory / "arrays", record["files"])
    arrays = _read_arrays(directory / "arrays", record["arrays"])
    for older in range(version, FORMAT_VERSION):
        if older not in MIGRATIONS:
            raise UserError(
                f"the cartridge in {directory} has format version {version}, which this program no longer "
                f"reads (it writes {FORMAT_VERSION}); train it again"
            )
        record, arrays = MIGRATIONS[older](record, arrays)
    fields = {field.name: record[field.name] for field in dataclasses.fields(CartridgeMetadata)}
    fields["corpus"] = CorpusSource(**fields["corpus"])
    fields["frozen_slots"] = tuple((start, stop) for start, stop in fields["frozen_slots"])
    metadata = CartridgeMetadata(**fields)
    prefix = KVPrefix(
        **{name: jnp.asarray(array) for name, array in arrays.items()},
        next_position=metadata.next_position,
    )
    return Cartridge(prefix=prefix, metadata=metadata)


def _prefix_arrays(prefix: KVPrefix) -> dict[str, np.ndarray]:
    """The prefix's arrays by field name, a bias only where there is one."""
    names = ("keys", "values", "positions", "group", "bias")
    arrays = {name: getattr(prefix, name) for name in names}
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


def _refuse_not_finite(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name in ("keys", "values", "bias"):
        if name not in arrays:
            continue
        # A bias of -inf is a slot that is switched off.
        bad = ~np.isfinite(arrays[name])
        if name == "bias":
            bad &= arrays[name] != -np.inf
        if bad.any():
            raise UserError(
                f"{directory}: not saved, {bad.sum()} of {bad.size} {name} are NaN or infinite (first in layer "
                f"{int(np.argwhere(bad)[0][0])}); the training diverged: lower the learning rate"
            )


def _write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _stored(arrays))
        checkpointer.wait_until_finished()


def _read_arrays(path: pathlib.Path, described: Mapping[str, dict]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    arrays = _empty_like(described)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays |= checkpointer.restore(path, _stored(arrays))
    except Exception as error:  # orbax promises no types for what damage may do
        raise _Damaged(f"arrays unreadable: {_reason(error)}") from error
    _verify(arrays, described)
    return arrays


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: pathlib.Path) -> None:
    for parent, _, names in os.walk(root):
        for path in [*(pathlib.Path(parent, name) for name in names), pathlib.Path(parent)]:
            _fsync(path)


# --- Train state -------------------------------------------------------------------------


class TrainCheckpoints:
    """The last few train states of one run, over orbax's CheckpointManager.

    A state is any pytree of arrays; a PRNG key goes in as `jax.random.key_data`. Nothing here
    deletes a checkpoint except retention, and only after a newer one is complete.

    Args:
      directory: made if absent. Belongs to these checkpoints alone.
      keep: how many checkpoints stay; 2 or more leave one to fall back on.
      asynchronous: save in the background (see `wait`).

    Raises:
      UserError: `keep` below 1.
    """

    def __init__(self, directory: str | os.PathLike, keep: int, *, asynchronous: bool = False):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise UserError(f"keep={keep} checkpoints: keep at least 1")
        self._directory = _absolute(directory)
        self._asynchronous = asynchronous
        self._damaged: set[int] = set()
        self._without_files: int | None = None  # saved last, its files' checksums still to come
        self._pending_bytes = 0
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=asynchronous
            ),
        )

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Saves `state` and the JSON `extra` as checkpoint `step`.

        Returns when the checkpoint is complete or, if asynchronous, as soon as `state` may be
        donated.

        Raises:
          UserError: a full disk, or a checkpoint of this or a later step.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._remove_unfinished()
        self._set_damaged_aside()
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise UserError(
                f"{self._directory}: step {step} cannot be saved behind the checkpoint of step {latest}; "
                "resume from that one or choose another directory"
            )
        # Copied if written later: a view would keep a CPU's buffer from being donated.
        fetch = np.array if self._asynchronous else np.asarray
        arrays = {name: fetch(leaf) for name, leaf in _named_leaves(state).items()}
        record = _seal({"extra": dict(extra), "arrays": _describe(arrays)})
        self._pending_bytes = sum(array.nbytes for array in arrays.values())
        with self._failing_cleanly():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_stored(arrays)),
                    record=ocp.args.JsonSave(record),
                ),
                force=True,  # orbax's own policy skips saves silently
            )
        self._without_files = step
        if not self._asynchronous:
            self.wait()

    def latest_step(self) -> int | None:
        """The newest checkpoint not known to be damaged: after `restore`, the one restored."""
        return max(self._steps(), default=None)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """The state and `extra` of `step`, or of the newest checkpoint that is intact.

        Args:
          abstract_state: the state's pytree, of arrays or ShapeDtypeStructs. A leaf with a
            sharding comes back with it, a NumPy leaf as NumPy, others uncommitted on the
            default device.
          step: that checkpoint or none; without it, damaged ones are passed over with a warning.

        Raises:
          UserError: no checkpoint, none intact, or one of another shape of state.
        """
        self.wait()
        steps = sorted(self._steps(), reverse=True)
        if not steps:
            raise UserError(f"no checkpoint in {self._directory}; start the stage from its beginning")
        if step is not None and step not in steps:
            raise UserError(
                f"no checkpoint of step {step} in {self._directory}; it has {sorted(steps)}"
            )
        damaged: set[int] = set()
        for candidate in steps if step is None else [step]:
            try:
                arrays, extra = self._read(candidate, abstract_state)
            except _Damaged as error:
                reason = f"step {candidate}: {error}"
                logging.getLogger(__name__).warning(
                    "%s: the checkpoint of step %d is damaged (%s)", self._directory, candidate, error
                )
                damaged.add(candidate)
                continue
            self._damaged |= damaged  # only now that there is one to go on from
            leaves, structure = jax.tree.flatten(abstract_state)
            restored = [_like(a, leaf) for a, leaf in zip(arrays.values(), leaves, strict=True)]
            return jax.tree.unflatten(structure, restored), extra
        raise UserError(
            f"no intact checkpoint in {self._directory} ({reason}); delete that directory to start "
            "the stage over"
            if step is None
            else f"the checkpoint in {self._directory} is damaged ({reason}); restore another step"
        )

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          UserError: the disk filled up meanwhile.
        """
        if self._without_files is None:
            return
        step, self._without_files = self._without_files, None
        with self._failing_cleanly(begun=True):
            self._manager.wait_until_finished()
            # Renamed into place: half a list would condemn an intact checkpoint.
            path = self._directory / str(step)
            checksums = json.dumps(_file_checksums(path))
            (path / f"{FILES}.part").write_text(checksums)
            os.rename(path / f"{FILES}.part", path / FILES)

    def close(self) -> None:
        """Waits for the last save and stops orbax's threads."""
        self.wait()
        self._manager.close()

    def _steps(self) -> set[int]:
        return set(self._manager.all_steps()) - self._damaged

    def _read(self, step: int, abstract_state: Any) -> tuple[dict[str, np.ndarray], dict]:
        """The leaves of checkpoint `step` by name, in the order of the abstract state's."""
        import orbax.checkpoint as ocp

        def read(**items: Any) -> Any:
            try:
                return self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # orbax promises no types for what damage may do
                raise _Damaged(f"unreadable: {_reason(error)}") from error

        path = self._directory / str(step)
        # Absent if the process died right after orbax had finished: the arrays' own remain.
        if (path / FILES).exists():
            _verify_files(path, _read_json(path / FILES))
        record = _unseal(read(record=ocp.args.JsonRestore())["record"])
        described = record["arrays"]
        wanted = {
            name: (list(leaf.shape), jnp.dtype(leaf.dtype).name)
            for name, leaf in _named_leaves(abstract_state).items()
        }
        saved = {name: (d["shape"], d["dtype"]) for name, d in described.items()}
        if wanted != saved:
            name = next(n for n in {**wanted, **saved} if wanted.get(n) != saved.get(n))
            raise UserError(
                f"{self._directory}: the checkpoint of step {step} is of another configuration ({name} is "
                f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here); give back the old "
                "configuration or use another directory"
            )
        arrays = _empty_like({name: described[name] for name in wanted})
        arrays |= read(state=ocp.args.StandardRestore(_stored(arrays)))["state"]
        _verify(arrays, described)
        return arrays, record["extra"]

    def _set_damaged_aside(self) -> None:
        """Makes room for new steps in front of a damaged checkpoint, which is kept.

        Left in place it would count as one of the last `keep` and push out an intact one.
        """
        if not self._damaged:
            return
        for step in self._damaged:
            aside = self._directory / f"damaged-{step}"
            count = 1
            while aside.exists():
                count += 1
                aside = self._directory / f"damaged-{step}-{count}"
            os.rename(self._directory / str(step), aside)
        self._damaged.clear()
        self._manager.reload()

    @contextlib.contextmanager
    def _failing_cleanly(self, begun: bool = False) -> Iterator[None]:
        """A failed save leaves nothing behind; the disk may be full of what it wrote."""
        try:
            with _disk_space_for(self._directory, self._pending_bytes, begun):
                yield
        except Exception:
            self._remove_unfinished()
            self._manager.reload()
            raise

    def _remove_unfinished(self) -> None:
        """What killed or failed saves began; never called while one is under way."""
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path in the tree, such as `optimizer.0.mu.keys`, in the tree's order."""
    named = {
        jax.tree_util.keystr(path, simple=True, separator=".") or "state": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if len(named) != jax.tree.structure(tree).num_leaves:
        raise ValueError("two leaves of the state have the same path: rename keys that hold a dot")
    return named


def _like(array: np.ndarray, leaf: Any) -> Any:
    """`array` as `leaf` is kept: NumPy, with its sharding, or uncommitted."""
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    committed = leaf.committed if isinstance(leaf, jax.Array) else leaf.sharding is not None
    return jax.device_put(array, leaf.sharding) if committed else jnp.asarray(array)
