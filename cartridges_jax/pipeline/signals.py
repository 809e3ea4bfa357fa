"""Ways for a run to be stopped cleanly: all work so far is saved, and the same call resumes."""

from __future__ import annotations

import signal
from types import TracebackType

from cartridges_jax.errors import Interrupted
from cartridges_jax.parallel import ALONE, Job


class NeverStops:
    """The default in library code: nothing stops a run but exceptions."""

    def __init__(self, job: Job = ALONE):
        self._job = job

    def __enter__(self) -> NeverStops:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        return None

    def requested(self) -> bool:
        """Returns True to stop here; polled after every step that all processes take together, the same in each."""
        return self._job.stops_here(None)

    def check(self) -> None:
        """Raises `Interrupted` if a stop was requested, at a place where no other process has to stop as well."""
        signum = self._job.stop_wanted(None)
        if signum is not None:
            raise Interrupted(signum)


class StopSignals(NeverStops):
    """Stops at the first SIGINT or SIGTERM; for programs, whose main thread installs the handlers.

    The handler only records the signal: raising from it would not do, because Python may run it inside a callback
    whose exceptions are dropped (JAX has one for the garbage collector). A second signal ends the process at once.

    Args:
      job: the processes that stop together, whichever of them received the signal.
    """

    def __init__(self, job: Job = ALONE):
        super().__init__(job)
        self._signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def requested(self) -> bool:
        return self._job.stops_here(self._signum)

    def check(self) -> None:
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
