"""A training run's checkpoints for all processes of its job: the first one reads and writes them.

A state is a cartridge with its optimizer's moments, some hundred megabytes for a large model:
gathering it on every host is cheap, and makes what lies on disk the same, checksums included,
whatever mesh and however many hosts saved it. So it can be restored onto any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cartridges_jax import parallel
from cartridges_jax.checkpoint import TrainCheckpoints
from cartridges_jax.parallel import Job


class SharedCheckpoints:
    """`TrainCheckpoints` of which all processes call the same methods together.

    Attributes:
      latest: the newest step that is not known to be damaged; None without one.
    """

    def __init__(self, directory: Path, keep: int, job: Job):
        self._job = job
        # In the background on accelerators, which work on meanwhile; a CPU would have to share itself.
        in_background = jax.default_backend() != "cpu"
        self._own = TrainCheckpoints(directory, keep, asynchronous=in_background) if job.is_first else None
        self.latest: int | None = job.from_first(lambda: self._own.latest_step())

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """As `TrainCheckpoints.save`; does nothing where the newest is of this step."""
        if self.latest == step:
            return
        if self._job.num_processes > 1:
            state = jax.tree.map(parallel.fetch, state)
        if self._own is not None:
            self._own.save(step, state, extra)
        self.latest = step

    def complete(self) -> None:
        """Returns when what was saved is complete: in all processes, so that none ends the job before."""
        if self._own is not None:
            self._own.wait()
        self._job.wait_for_all()

    def restore(self, state: Any) -> tuple[Any, dict]:
        """The newest intact state, lying as the given one does, and its `extra`.

        Args:
          state: of arrays.
        """
        if self._job.num_processes == 1:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            restored, extra = self._own.restore(abstract)
            self.latest = self._own.latest_step()
            return restored, extra
        # Like the state in shape, and what the processes that do not read contribute.
        arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
        extra: dict = {}
        if self._own is not None:
            arrays, extra = self._own.restore(arrays)
        extra, self.latest = self._job.from_first(lambda: (extra, self._own.latest_step()))
        arrays = self._job.arrays_from_first(arrays)
        return parallel.place(arrays, jax.tree.map(lambda x: x.sharding, state)), extra

    def close(self) -> None:
        """Returns when what was saved is complete."""
        if self._own is not None:
            self._own.close()
