"""SIGINT and SIGTERM end a run cleanly: what was made is kept, the same command goes on."""

from __future__ import annotations

import signal

from cartridges_jax.errors import Interrupted
from cartridges_jax.parallel import ALONE, Job


class StopSignals:
    """Notes the first SIGINT or SIGTERM; the work asks for it where stopping is safe.

    Raising from the handler itself would not do: Python may run it inside a callback
    whose exceptions are dropped (the garbage collector's, which JAX has one of). A second
    signal is not waited for: it ends the process as if nobody handled it.

    Args:
      job: whose processes stop together, whichever of them a signal came to.
    """

    def __init__(self, job: Job = ALONE):
        self._job = job
        self._signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def requested(self) -> bool:
        """Whether to stop here. To be asked after every step that all processes take together."""
        return self._job.stops_here(self._signum)

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come, where no other process need stop at the same place."""
        signum = self._job.stop_wanted(self._signum)
        if signum is not None:
            raise Interrupted(signum)

    def _note(self, signum: int, frame) -> None:
        self._signum = signum
        self._job.note(signum)
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
