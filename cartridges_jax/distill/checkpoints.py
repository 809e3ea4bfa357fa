"""Checkpoints of a training run for all processes of its job: process 0 reads and writes them.

A state is a cartridge with its optimizer's moments, some hundred megabytes for a large model.
Gathering it on every host is cheap, and the files are then the same, checksums included, for
every mesh and number of hosts. So a state can be restored onto any other mesh.
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
    """`TrainCheckpoints` whose methods all processes call together.

    Attributes:
      latest: the newest step that is not known to be damaged; None without one.
    """

    def __init__(self, directory: Path, keep: int, job: Job):
        self._job = job
        # In the background on accelerators, which compute meanwhile; a CPU would have to share its cores.
        in_background = jax.default_backend() != "cpu"
        self._own = TrainCheckpoints(directory, keep, asynchronous=in_background) if job.is_first else None
        self.latest: int | None = job.from_first(self._latest_on_disk)

    def _latest_on_disk(self) -> int | None:
        return None if self._own is None else self._own.latest_step()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Saves like `TrainCheckpoints.save`; does nothing if the newest checkpoint is of this step."""
        if self.latest == step:
            return
        if self._job.num_processes > 1:
            state = jax.tree.map(parallel.fetch, state)
        if self._own is not None:
            self._own.save(step, state, extra)
        self.latest = step

    def complete(self) -> None:
        """Waits until the last save is complete, in all processes, so that none ends the job before."""
        if self._own is not None:
            self._own.wait()
        self._job.wait_for_all()

    def restore(self, state: Any) -> tuple[Any, dict]:
        """The newest intact state, with the shardings of the given one, and its `extra`.

        Args:
          state: of arrays.
        """
        if self._job.num_processes == 1:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            assert self._own is not None
            restored, extra = self._own.restore(abstract)
            self.latest = self._latest_on_disk()
            return restored, extra
        # Of the state's shapes; processes that do not read contribute these.
        arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
        extra: dict = {}
        if self._own is not None:
            arrays, extra = self._own.restore(arrays)
        extra, self.latest = self._job.from_first(lambda: (extra, self._latest_on_disk()))
        arrays = self._job.arrays_from_first(arrays)
        return parallel.place(arrays, jax.tree.map(lambda x: x.sharding, state)), extra

    def close(self) -> None:
        """Closes the files when the last save is complete."""
        if self._own is not None:
            self._own.close()
