"""The table from logical axes to mesh axes, for everything on a mesh.

An array's axes have logical names: the decoder annotates its parameters; prefixes, caches
and batches name theirs where they are placed. Each name has two entries here: how the
array is split at rest, and how it is split in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


class Rule(NamedTuple):
    """The mesh axes that split a logical axis.

    Attributes:
      at_rest: while it is stored.
      in_use: while it is computed with; with fewer axes it is gathered first.
    """

    at_rest: tuple[str, ...]
    in_use: tuple[str, ...]


def _always(*axes: str) -> Rule:
    return Rule(axes, axes)


RULES: Mapping[str, Rule] = {
    # A batch's: conversations, cache rows, target tokens.
    "rows": _always("data", "fsdp"),
    # The same while rows of a table are looked up, and the width of those rows: the table stays
    # as it is at rest, so every device of fsdp takes all indices and finds its part of the width.
    "lookups": _always("data"),
    "lookup_width": _always("fsdp"),
    # All other axes.
    "heads": _always("tensor"),
    "kv_heads": _always("tensor"),
    "mlp": _always("tensor"),
    "vocab": _always("tensor"),
    "embed": Rule(("fsdp",), ()),
    "slots": Rule(("fsdp",), ()),
    "layers": _always(),
}


def partition(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], sizes: Sequence[int], *, in_use: bool = False
) -> PartitionSpec:
    """The spec by which an array is split.

    An axis takes its rule's mesh axes as far as they divide it, from the first on: what
    does not divide is replicated.

    Args:
      axes: per axis of the array its logical name, None for one that is never split.
      sizes: per axis what must be divided: its length, or of a parameter whose axis runs
        over heads, the number of heads.
      in_use: as it is computed with.

    Raises:
      ValueError: a name without a rule, or two axes of the array that their rules give
        the same mesh axis, whether or not it divides them.
    """
    taken: dict[str, str] = {}
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, sizes, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"the logical axis {name!r} has no rule: name one of {', '.join(RULES)}, or None")
        rule = () if name is None else RULES[name].in_use if in_use else RULES[name].at_rest
        for axis in rule:
            if axis in taken:
                raise ValueError(
                    f"the axes {taken[axis]!r} and {name!r} of one array would both be split over {axis!r}: "
                    "an array can be split over a mesh axis once"
                )
            taken[axis] = name
        parts.append(dividing(mesh, rule, size) or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def dividing(mesh: Mesh | AbstractMesh, rule: Sequence[str], size: int) -> tuple[str, ...]:
    """The first of a rule's mesh axes that together divide a size, without those of one device."""
    kept: list[str] = []
    for axis in rule:
        if mesh.shape[axis] == 1:
            continue
        if size % mesh.shape[axis]:
            break
        kept.append(axis)
        size //= mesh.shape[axis]
    return tuple(kept)


def parts_on(mesh: Mesh | AbstractMesh, axis: str, size: int, *, in_use: bool = True) -> int:
    """The number of parts that a mesh splits a logical axis of this length into."""
    rule = RULES[axis].in_use if in_use else RULES[axis].at_rest
    return math.prod(mesh.shape[name] for name in dividing(mesh, rule, size))


def row_parts(mesh: Mesh | None) -> int:
    """The number of parts that a mesh splits a batch's rows into, where all its row axes divide them."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["rows"].in_use)


def sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], sizes: Sequence[int], *, in_use: bool = False
) -> NamedSharding:
    """`partition` on its mesh."""
    return NamedSharding(mesh, partition(mesh, axes, sizes, in_use=in_use))
