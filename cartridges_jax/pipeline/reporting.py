"""Progress and messages of a run, as its caller wants them; the library itself prints nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Protocol

_LOGGER = logging.getLogger("cartridges_jax")


class Progress(Protocol):
    """A measure of how far one stage is."""

    def at(self, done: int, total: int | None = None, note: str = "") -> None:
        """Reports `done` of `total` (as before if None); the first call gives what was done before this run."""


class Reporter:
    """A receiver of messages and progress; this one logs to the logger "cartridges_jax" and shows no progress."""

    def say(self, text: str) -> None:
        """Receives one message."""
        _LOGGER.info("%s", text)

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        """The progress of the stage `name` while the context is open."""
        yield _Unseen()


class _Unseen:
    def at(self, done: int, total: int | None = None, note: str = "") -> None:
        pass
