"""The last few train states of one run; the newest intact one is restored."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.checkpoint._disk import absolute, refuse_if_too_full, refusing_if_it_fills_up
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
from cartridges_jax.errors import UserError

FILES = "files.json"


class TrainCheckpoints:
    """The last few train states of one run, over orbax's CheckpointManager.

    A state is any pytree of arrays; a PRNG key goes in as `jax.random.key_data`. Nothing here
    deletes a checkpoint except retention, and only after a newer one is complete.

    Args:
      directory: created if absent. Holds these checkpoints and nothing else.
      keep: the number of checkpoints that stay; 2 or more leave one to fall back on.
      asynchronous: save in the background (see `wait`).

    Raises:
      UserError: `keep` below 1.
    """

    def __init__(self, directory: str | os.PathLike, keep: int, *, asynchronous: bool = False):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise UserError(f"keep={keep} checkpoints: keep at least 1")
        self._directory = absolute(directory)
        self._asynchronous = asynchronous
        self._damaged: set[int] = set()
        self._pending: tuple[int, int] | None = None  # step and bytes of a save to be completed
        self._directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=asynchronous,
                create=False,  # orbax makes no directory for one process of several
                multiprocessing_options=alone(),
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
                f"{self._directory}: step {step} cannot be saved after the checkpoint of step "
                f"{latest}; resume from that one or choose another directory"
            )
        # A copy if written later: a view would prevent the donation of a CPU's buffer.
        fetch = np.array if self._asynchronous else np.asarray
        arrays = {name: fetch(leaf) for name, leaf in _named_leaves(state).items()}
        record = seal({"extra": dict(extra), "arrays": describe(arrays)})
        num_bytes = sum(array.nbytes for array in arrays.values())
        refuse_if_too_full(self._directory, num_bytes)
        with self._failing_cleanly(num_bytes):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(stored(arrays)),
                    record=ocp.args.JsonSave(record),
                ),
                force=True,  # orbax's own policy skips saves silently
            )
        self._pending = step, num_bytes
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          UserError: the disk filled up meanwhile.
        """
        if self._pending is None:
            return
        (step, num_bytes), self._pending = self._pending, None
        with self._failing_cleanly(num_bytes):
            self._manager.wait_until_finished()
            path = self._directory / str(step)
            # Renamed into place: with half a list an intact checkpoint would count as damaged.
            part = path / f"{FILES}.part"
            part.write_text(json.dumps(file_checksums(path)))
            os.rename(part, path / FILES)

    def close(self) -> None:
        """Waits for the last save and stops orbax's threads."""
        self.wait()
        self._manager.close()

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
            raise UserError(f"no checkpoint of step {step} in {self._directory}; it has {sorted(steps)}")
        candidates = steps if step is None else [step]
        for candidate in candidates:
            try:
                arrays, extra = self._read(candidate, abstract_state)
            except Damaged as error:
                reason = f"step {candidate}: {error}"
                logging.getLogger(__name__).warning(
                    "%s: the checkpoint of step %d is damaged (%s)",
                    self._directory,
                    candidate,
                    error,
                )
                continue
            # Only once an intact one is found: those tried before it.
            self._damaged.update(tried for tried in candidates if tried > candidate)
            leaves, structure = jax.tree.flatten(abstract_state)
            restored = [_like(a, leaf) for a, leaf in zip(arrays.values(), leaves, strict=True)]
            return jax.tree.unflatten(structure, restored), extra
        raise UserError(
            f"no intact checkpoint in {self._directory} ({reason}); delete that directory to start the stage over"
            if step is None
            else f"the checkpoint in {self._directory} is damaged ({reason}); restore another step"
        )

    def _steps(self) -> set[int]:
        return set(self._manager.all_steps()) - self._damaged

    def _read(self, step: int, abstract_state: Any) -> tuple[dict[str, np.ndarray], dict]:
        """The leaves of checkpoint `step` by name, in the order of the abstract state's."""
        import orbax.checkpoint as ocp

        def read(**items: Any) -> Any:
            try:
                return self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # orbax promises no types for what damage may do
                raise Damaged(f"unreadable: {in_short(error)}") from error

        path = self._directory / str(step)
        # Absent if the process died right after orbax had finished; the arrays still have their own checksums.
        if (path / FILES).exists():
            verify_files(path, read_json(path / FILES))
        record = unseal(read(record=ocp.args.JsonRestore())["record"])
        described = record["arrays"]
        wanted = {
            name: (list(leaf.shape), jnp.dtype(leaf.dtype).name) for name, leaf in _named_leaves(abstract_state).items()
        }
        saved = {name: (d["shape"], d["dtype"]) for name, d in described.items()}
        if wanted != saved:
            name = next(n for n in {**wanted, **saved} if wanted.get(n) != saved.get(n))
            raise UserError(
                f"{self._directory}: the checkpoint of step {step} is of another configuration "
                f"({name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} "
                "here); give back the old configuration or use another directory"
            )
        arrays = empty_like({name: described[name] for name in wanted})
        arrays |= read(state=ocp.args.StandardRestore(stored(arrays)))["state"]
        verify_arrays(arrays, described)
        return arrays, record["extra"]

    def _set_damaged_aside(self) -> None:
        """Renames damaged checkpoints, so that earlier steps can be saved again; none is deleted.

        Left in place it would count as one of the last `keep` and push out an intact one.
        """
        if not self._damaged:
            return
        for step in self._damaged:
            aside = self._directory / f"damaged-{step}"
            while aside.exists():
                aside = aside.with_name(f"{aside.name}-again")
            os.rename(self._directory / str(step), aside)
        self._damaged.clear()
        self._manager.reload()

    @contextlib.contextmanager
    def _failing_cleanly(self, num_bytes: int) -> Iterator[None]:
        """Removes the unfinished files of a save that fails in the block; they may fill the disk.

        A checkpoint that lacks only its list of files stays: it can be restored, and retention
        may have taken an older one for it.
        """
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._manager.reload)
            on_failure.callback(self._remove_unfinished)
            with refusing_if_it_fills_up(self._directory, num_bytes):
                yield
            on_failure.pop_all()

    def _remove_unfinished(self) -> None:
        """Removes the files of killed or failed saves; never called during a save."""
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
    """`array` in the form of `leaf`: NumPy, with its sharding, or uncommitted."""
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    committed = leaf.committed if isinstance(leaf, jax.Array) else leaf.sharding is not None
    return jax.device_put(array, leaf.sharding) if committed else jnp.asarray(array)
