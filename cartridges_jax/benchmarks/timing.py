"""Times of several programs that do the same work, measured in turns.

On a shared machine the speed of everything drifts within minutes. So the candidates take
turns within every round, and what is compared is their ratio within a round, never two
numbers that were taken apart.
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
      seconds: of the warm rounds, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def per_second(self, amount: float) -> float:
        """Amount of work a round / median seconds."""
        return amount / self.median

    @property
    def spread(self) -> float:
        """Slowest round over fastest. Far above 1, somebody else used the machine: measure again."""
        return max(self.seconds) / min(self.seconds)

    def times_faster_than(self, other: Times) -> float:
        """Median over the rounds of the other's seconds by one's own."""
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
      candidates: name to a call that returns when its work is done (a call that only
        starts work must wait for it).
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
        # Nobody always comes behind the same neighbour, whose memory traffic it inherits.
        order = order[1:] + order[:1]
    return {name: Times(tuple(values)) for name, values in seconds.items()}
