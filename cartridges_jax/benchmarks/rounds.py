"""The frame of every benchmark: rounds in which the candidates alternate, and a row of their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cartridges_jax.benchmarks import peers
from cartridges_jax.benchmarks.inputs import OURS, Common
from cartridges_jax.benchmarks.machine import Ceilings
from cartridges_jax.benchmarks.peers import Absent
from cartridges_jax.benchmarks.results import Bar
from cartridges_jax.benchmarks.timing import WARMUPS, Times, interleaved


def take_turns(label: str, candidates: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, Times]:
    """`timing.interleaved` with a progress bar."""
    with Bar((repeats + WARMUPS) * len(candidates), label) as tick:
        return interleaved(candidates, repeats=repeats, on_progress=tick)


def take_turns_with_ceilings(
    label: str, candidates: Mapping[str, Callable[[], object]], ceilings: Ceilings, *, repeats: int
) -> tuple[dict[str, Times], dict[str, Any]]:
    """The candidates' times, and the machine's ceilings within the same rounds (`Ceilings.measured`)."""
    times = take_turns(label, {**candidates, **ceilings.candidates}, repeats=repeats)
    return {name: times[name] for name in candidates}, ceilings.measured(times)


def keeping(kept: dict[str, Any], name: str, call: Callable[[], Any]) -> Callable[[], None]:
    """A call that stores its first result in `kept[name]`."""

    def timed() -> None:
        result = call()
        kept.setdefault(name, result)

    return timed


def compared(times: Mapping[str, Times], rivals: Sequence[str], amount: float) -> dict[str, Any]:
    """Our side against the rivals, as fields of a row of `Result`.

    Args:
      amount: amount of work in a round, in the result's unit.
    """
    return {
        "value": times[OURS].per_second(amount),
        "peers": {name: times[name].per_second(amount) for name in rivals},
        "ratio": {name: times[OURS].times_faster_than(times[name]) for name in rivals},
    }


def compared_variants(
    times: Mapping[str, Times],
    variants: Sequence[str],
    rivals: Sequence[str],
    amount: float,
    fraction_of_limit: Mapping[str, float],
) -> dict[str, Any]:
    """Our side with other storage of the weights against the rivals, by name."""
    return {
        name: {
            "value": times[name].per_second(amount),
            "ratio": {rival: times[name].times_faster_than(times[rival]) for rival in rivals},
            "fraction_of_limit": fraction_of_limit[name],
        }
        for name in variants
    }


def durations(times: Mapping[str, Times]) -> dict[str, Any]:
    """Every round's seconds and their spread, by candidate, for a row of `Result`."""
    return {
        "seconds": {name: list(taken.seconds) for name, taken in times.items()},
        "spread": {name: taken.spread for name, taken in times.items()},
    }


def absent_peers(common: Common, *names: str) -> list[Absent]:
    """The peers that cannot be measured here; none if the settings ask for no peers."""
    return [peer for peer in map(peers.absent, names) if peer] if common.peers else []
