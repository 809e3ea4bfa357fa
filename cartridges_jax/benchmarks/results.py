"""The result of a benchmark: one line of JSON, the same as a file, and a figure."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tqdm

from cartridges_jax.benchmarks.peers import Absent


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished benchmark.

    Attributes:
      benchmark: the benchmark's name.
      unit: unit of `value` and of the peers' values.
      rows: one dict per setting, each with "value", "peers", "ratio" and
        "fraction_of_limit"; ratio is value / peer's value, measured within rounds.
      machine: ceilings and versions.
      absent: peers that were not measured.
      more: further fields of the record.
    """

    benchmark: str
    unit: str
    rows: list[dict[str, Any]]
    machine: dict[str, Any]
    absent: list[Absent]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The printed record, whose value, peers and ratio are the first row's."""
        first = self.rows[0]
        nothing = {peer.name: None for peer in self.absent}
        return _finite(
            {
                "benchmark": self.benchmark,
                "value": first["value"],
                "unit": self.unit,
                "peers": {**first["peers"], **nothing},
                "ratio": {**first["ratio"], **nothing},
                "fraction_of_limit": first["fraction_of_limit"],
                "rows": self.rows,
                "absent": {peer.name: peer.how_to_install for peer in self.absent},
                "machine": self.machine,
                **self.more,
            }
        )


def write(result: Result, workdir: Path) -> dict[str, Any]:
    """Writes `NAME.json` into the workdir; returns the record."""
    record = result.record()
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / f"{result.benchmark}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def one_line(record: Mapping[str, Any]) -> str:
    """The record as one line of JSON."""
    return json.dumps(record, separators=(",", ":"))


def _finite(value: Any) -> Any:
    """The value with numbers rounded to five digits, and None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


class Bar:
    """A progress bar on stderr with one tick per timed call."""

    def __init__(self, total: int, name: str):
        terminal = sys.stderr.isatty()
        # A log gets a line every ten seconds instead of a redrawn bar.
        self._bar = tqdm.tqdm(
            total=total, desc=name, file=sys.stderr, dynamic_ncols=terminal, mininterval=0.5 if terminal else 10.0
        )

    def __enter__(self) -> Callable[[str], None]:
        def tick(name: str) -> None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update(1)

        return tick

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def say_absent(absent: list[Absent]) -> None:
    """Prints one line per peer that is not measured."""
    for peer in absent:
        print(f"{peer.name} is absent, not measured: {peer.how_to_install}", file=sys.stderr)
