"""Progress bars and messages in a terminal or a log, for the programs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import tqdm

from cartridges_jax.pipeline.reporting import Progress, Reporter


class TerminalReporter(Reporter):
    """Prints messages on stdout, and on stderr a bar per stage with the time left."""

    def say(self, text: str) -> None:
        """Prints at once: a log that a scheduler reads is a pipe, and this process may be ended from outside."""
        print(text, flush=True)

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        """A bar for one stage."""
        terminal = sys.stderr.isatty()
        with tqdm.tqdm(
            desc=f"{name:9}",
            total=total,
            file=sys.stderr,
            dynamic_ncols=terminal,
            # A log gets a line now and then instead of a redrawn bar.
            mininterval=0.5 if terminal else 10.0,
            ncols=None if terminal else 110,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed} gone, {remaining} left{postfix}]",
        ) as bar:
            yield _Bar(bar)


class _Bar:
    """A bar whose first report says what was there before this run; it does not count in the estimate."""

    def __init__(self, bar: tqdm.tqdm):
        self._bar = bar
        self._begun = False

    def at(self, done: int, total: int | None = None, note: str = "") -> None:
        if total is not None:
            self._bar.total = total
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        if self._begun:
            self._bar.update(done - self._bar.n)
        else:
            self._begun = True
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
            self._bar.refresh()
