"""SIGINT and SIGTERM end a run cleanly: what was made is kept, the same command goes on."""
from __future__ import annotations

import signal


class Interrupted(BaseException):
    """The run was asked to stop. A BaseException, so that no handler of errors swallows it."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class StopSignals:
    """Notes the first SIGINT or SIGTERM; the work asks for it where stopping is safe.

    Raising from the handler itself would not do: Python may run it inside a callback
    whose exceptions are dropped (the garbage collector's, which JAX has one of). A second
    signal is not waited for: it ends the process as if nobody handled it.
    """

    def __init__(self):
        self._signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signum is not None

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def _note(self, signum: int, frame) -> None:
        self._signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
