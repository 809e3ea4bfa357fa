"""Progress bars with the time left, one per stage."""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import tqdm


class Progress:
    """A bar that is told how far the work is."""

    def __init__(self, bar: tqdm.tqdm):
        self._bar = bar

    def at(self, done: int, total: int | None = None, note: str = "") -> None:
        """Moves the bar to `done`."""
        if total is not None and total != self._bar.total:
            self._bar.total = total
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)


@contextlib.contextmanager
def progress(name: str, total: int, *, already: int = 0) -> Iterator[Progress]:
    """A bar for one stage; what was done before this run does not count in its estimate."""
    terminal = sys.stderr.isatty()
    with tqdm.tqdm(
        desc=f"{name:9}", total=total, initial=already, file=sys.stderr, dynamic_ncols=terminal,
        # A log gets a line now and then instead of a redrawn bar.
        mininterval=0.5 if terminal else 10.0, ncols=None if terminal else 100,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed} gone, {remaining} left] {postfix}",
    ) as bar:
        yield Progress(bar)
