"""SIGINT and SIGTERM end a run cleanly: what was made is kept, the same command goes on."""
from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(BaseException):
    """The run was asked to stop. A BaseException, so that no handler of errors swallows it."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into `Interrupted`, at once or when it is convenient.

    Files are written whole or not at all, so most work may be broken off anywhere; a
    block under `deferred()` is not, and asks `requested()` instead.
    """

    def __init__(self):
        self._deferring = False
        self._signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def requested(self) -> bool:
        return self._signum is not None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block a signal is only noted; it takes effect at the block's end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._signum is not None:
            raise Interrupted(self._signum)

    def _handle(self, signum: int, frame) -> None:
        self._signum = signum
        if not self._deferring:
            raise Interrupted(signum)
