"""The collectives of a compiled program, read from its HLO text.

A program consists of computations that call each other. A collective in a loop's body counts once for
every iteration. XLA writes the number of iterations beside most loops; for a loop whose end depends on
its data (decoding stops when all rows have ended), the caller passes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|called_computations|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_ON_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_BITS = {"pred": 8, "bf16": 16}


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      arrays: (dtype, shape) of its results on one device.
      groups: the devices that exchange among themselves.
      times: number of times that it runs in one run of the program.
      depth: number of loops around it.
      sent: bytes that a device sends each time, in a ring.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...]
    times: int
    depth: int
    sent: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str


def collectives(text: str, *, trips_of_open_loops: int | None = None) -> list[Collective]:
    """All collectives that a program runs.

    Args:
      text: a compiled program (`jax.stages.Compiled.as_text`).
      trips_of_open_loops: iterations of loops whose number the text does not state; None if no such loop may send.

    Raises:
      ValueError: a loop with a collective whose number of iterations is unknown.
    """
    computations, entry = _read(text)
    number = _number_of_devices(text)
    found: list[Collective] = []

    def visit(name: str, times: int | None, depth: int, scattered: bool) -> None:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                if times is None:
                    raise ValueError(
                        f"{instruction.name} ({kind}) is sent in a loop whose number of iterations the program does not "
                        "state: pass trips_of_open_loops"
                    )
                found.append(_collective(instruction, kind, number, times, depth, scattered))
            if instruction.opcode == "while":
                trips = _trips(instruction, computations)
                trips = trips_of_open_loops if trips is None else trips
                for called in _called(instruction):
                    visit(called, None if None in (times, trips) else times * trips, depth + 1, False)
            elif kind not in KINDS and not kind.endswith(("-done", "-update")):
                for called in _called(instruction):
                    # The TPU compiler fuses a reduce-scatter from an all-reduce and a slice.
                    visit(called, times, depth, scattered or "all-reduce-scatter" in called)

    visit(entry, 1, 0, False)
    return found


def _read(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif head := None if line.startswith((" ", "HloModule")) else _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _called(instruction: _Instruction) -> Iterator[str]:
    yield from _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """The iterations of a loop, as XLA states them or by the constant that its counter is compared with."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)
    body = computations.get(condition[1], []) if condition else []
    if len([one for one in body if one.opcode not in ("parameter", "get-tuple-element", "constant")]) != 1:
        return None
    constants = [one for one in body if one.opcode == "constant"]
    compared = any(one.opcode == "compare" and "direction=LT" in one.rest for one in body)
    return int(constants[0].rest.split(")")[0]) if compared and len(constants) == 1 else None


def _collective(
    instruction: _Instruction, kind: str, number: int, times: int, depth: int, scattered: bool
) -> Collective:
    arrays = _arrays(instruction.type)
    if instruction.opcode.endswith("-start"):
        # Operands and results; a permute has two counters too.
        if kind == "collective-permute":
            arrays = arrays[1:2]
        elif kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
    groups = _groups(instruction.rest, number)
    others = len(groups[0]) - 1
    size = sum(_bytes(array) for array in arrays)
    if kind == "all-reduce" and scattered:
        kind, sent = "reduce-scatter", size * others / len(groups[0])
    else:
        share = others / len(groups[0])
        sent = size * {
            "all-gather": share, "all-reduce": 2 * share, "reduce-scatter": others, "all-to-all": share,
            "collective-permute": 1,
        }[kind]  # fmt: skip
    return Collective(kind, arrays, groups, times, depth, sent)


def _arrays(written: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(written)
    )


def _bytes(array: tuple[str, tuple[int, ...]]) -> float:
    dtype, shape = array
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(shape) * bits / 8


def _number_of_devices(text: str) -> int:
    head = text[: text.index("\n")]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
    return math.prod(int(count) for count in counts)


def _groups(rest: str, number: int) -> tuple[tuple[int, ...], ...]:
    """The devices' numbers, which XLA writes in three notations.

    {{0,4},{1,5},{2,6},{3,7}}                                       lists
    [4,2]<=[2,4]T(1,0)                                              rows of a transposed range
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}               along axes of a mesh of such a range
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", rest):
        return tuple(tuple(int(i) for i in pair.split(",")) for pair in re.findall(r"\{([\d,]+)\}", pairs[1]))
    if written := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return tuple(tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", written[1]))
    if ranged := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        numbers = _transposed_range(*_range(ranged[3], ranged[4]))
        size = int(ranged[2])
        return tuple(tuple(numbers[first : first + size]) for first in range(0, len(numbers), size))
    if mesh := _ON_MESH.search(rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        return _along(
            sizes, re.findall(r"'([^']+)'", mesh[4]), *_range(mesh[2] or str(math.prod(sizes.values())), mesh[3])
        )
    if "replica_groups={}" in rest:
        return (tuple(range(number)),)
    raise ValueError(f"unknown notation of groups of devices: {rest[:300]}")


def _range(shape: str, order: str | None) -> tuple[list[int], list[int]]:
    sizes = [int(i) for i in shape.split(",")]
    return sizes, [int(i) for i in order.split(",")] if order else list(range(len(sizes)))


def _along(sizes: dict[str, int], axes: list[str], shape: list[int], order: list[int]) -> tuple[tuple[int, ...], ...]:
    """Groups of the devices that differ along these axes only."""
    numbers = _transposed_range(shape, order)
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, index in enumerate(itertools.product(*(range(size) for size in sizes.values()))):
        others = tuple(at for axis, at in zip(sizes, index) if axis not in axes)
        groups.setdefault(others, []).append(numbers[place])
    return tuple(map(tuple, groups.values()))


def _transposed_range(shape: list[int], order: list[int]) -> list[int]:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    numbers = [0]
    for axis in order:
        numbers = [number + index * strides[axis] for number in numbers for index in range(shape[axis])]
    return numbers
