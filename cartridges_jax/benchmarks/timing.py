"""Times of several programs that do the same work, measured in turns.

On a shared machine the speed drifts within minutes. So the candidates alternate within
every round, and results compare ratios within a round, never two numbers of different
times.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

# The first round compiles; a state that a program returned may compile once more.
WARMUPS = 2


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one candidate, one per round.

    Attributes:
      seconds: seconds of the warm rounds, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def per_second(self, amount: float) -> float:
        """The amount of work of a round over the median seconds."""
        return amount / self.median

    @property
    def spread(self) -> float:
        """The slowest round over the fastest; far above 1, other processes used the machine."""
        return max(self.seconds) / min(self.seconds)

    def times_faster_than(self, other: Times) -> float:
        """The median over the rounds of the other's seconds over these."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmups: int = WARMUPS,
    on_progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Times]:
    """Runs every candidate `warmups + repeats` times, in turns.

    Args:
      candidates: calls by name, each of which returns when its work is done (a call that
        only starts work must wait for it).
      repeats: measured rounds.
      warmups: rounds before them; they compile and fill caches.
      on_progress: called with a candidate's name after each of its calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for round_number in range(warmups + repeats):
        for name in order:
            start = time.perf_counter()
            candidates[name]()
            took = time.perf_counter() - start
            if round_number >= warmups:
                seconds[name].append(took)
            on_progress(name)
        # The order rotates: no candidate always follows the same one, whose memory traffic it inherits.
        order = order[1:] + order[:1]
    return {name: Times(tuple(values)) for name, values in seconds.items()}
