"""The devices of a run as a mesh, from one line such as "data:2,fsdp:4,tensor:2"."""
from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from cartridges_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
_EXAMPLE = "write it as data:2,fsdp:4,tensor:2, where one size may be -1 (whatever is left)"


def parse_mesh(line: str) -> dict[str, int]:
    """The size of every axis of `AXES`: 1 if it is not named, -1 if it is to be inferred.

    Raises:
      UserError: an axis that is unknown or named twice, a size that is none, two that are
        to be inferred.
    """
    sizes: dict[str, int] = {}
    for part in line.split(","):
        name, _, size = (piece.strip() for piece in part.partition(":"))
        if name not in AXES:
            raise UserError(f"mesh={line!r}: there is no axis {name!r}, only {', '.join(AXES)}; {_EXAMPLE}")
        if name in sizes:
            raise UserError(f"mesh={line!r} names {name} twice: give each axis one size")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise UserError(f"mesh={line!r}: {size!r} is not a size of {name}; {_EXAMPLE}") from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise UserError(f"mesh={line!r}: {name}:{size} must be 1 or more, or -1 for whatever is left")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh={line!r} leaves more than one size open: only one can be inferred")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(line: str, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh that a line describes; None for "", which is one device.

    Args:
      devices: all that there are, of every process, if not given.

    Raises:
      UserError: as `parse_mesh`, or sizes that do not make up the number of devices: one
        that stands idle would go unnoticed.
    """
    if not line:
        return None
    sizes = parse_mesh(line)
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(size for size in sizes.values() if size != -1)
    inferred = max(len(devices) // fixed, 1)
    sizes = {axis: inferred if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh={line!r} asks for {math.prod(sizes.values())} devices and there are {len(devices)}: "
            f"change a size, or leave one to be inferred (data:-1)"
        )
    # Auto: the compiler partitions, led by the rules; jax.make_mesh would make Explicit axes by default.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )
