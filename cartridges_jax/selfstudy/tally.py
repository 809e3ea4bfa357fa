"""Counts of the messages that were written and of those that were dropped, per seed family."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping


class Tally:
    """The counts of a batch or a run.

    Attributes:
      written: family to messages that A wrote.
      dropped: family to reason to messages that are not in the result.
    """

    def __init__(self) -> None:
        self.written: Counter[str] = Counter()
        self.dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def drop(self, family: str, reason: str) -> None:
        """Counts one message."""
        self.dropped[family][reason] += 1

    def add(self, counts: Mapping) -> None:
        """Adds what `as_dict` of another tally returned."""
        self.written.update(counts["written"])
        for family, reasons in counts["dropped"].items():
            self.dropped[family].update(reasons)

    def as_dict(self) -> dict[str, dict]:
        """The counts as JSON values, in alphabetical order."""
        return {
            "written": dict(sorted(self.written.items())),
            "dropped": {family: dict(sorted(self.dropped[family].items())) for family in sorted(self.dropped)},
        }

    def by_reason(self) -> str:
        """The drops of all families in one line, the most frequent reason first: "about 12, cut 3"."""
        total: Counter[str] = sum(self.dropped.values(), Counter())
        return ", ".join(f"{reason} {count}" for reason, count in total.most_common()) or "none"
