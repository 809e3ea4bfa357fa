"""The devices of a run as a mesh, from one line such as "data:2,fsdp:4,tensor:2"."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from cartridges_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
_EXAMPLE = "write it as data:2,fsdp:4,tensor:2, where one size may be -1 (whatever is left)"


def parse_mesh(line: str) -> dict[str, int]:
    """The size of every axis of `AXES`: 1 if it is not named, -1 if it is to be inferred.

    Raises:
      UserError: an unknown axis or one named twice, a value that is not a size, or two sizes
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
      devices: all devices of all processes by default.

    Raises:
      UserError: as `parse_mesh`, or sizes whose product is not the number of devices:
        an idle device would go unnoticed.
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
    # Each mesh axis consists of whole axes of the slice where possible; one is split (8x2 on a 4x4) only if asked for.
    laid_out = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    # Auto: the compiler partitions, led by the rules.
    return Mesh(laid_out, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def independent_parts(mesh: Mesh) -> list[Mesh]:
    """The mesh cut along `data` into parts whose processes have devices in no other part.

    Parameters are not split over `data`, so every part holds all of the model, and its
    processes can run programs of their own while others run theirs. A mesh of one process
    is one part, and so is one whose other axes span all processes.
    """
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return [Mesh(mesh.devices[rows], mesh.axis_names, axis_types=mesh.axis_types) for rows in _unshared_rows(processes)]


def _unshared_rows(labels: np.ndarray) -> list[list[int]]:
    """Rows of labels [R, …] in groups, so that no label occurs in two: groups and rows in ascending order."""
    groups: list[tuple[list[int], set[int]]] = []
    for row in range(len(labels)):
        rows, seen = [row], set(labels[row].flat)
        for group in [group for group in groups if group[1] & seen]:
            groups.remove(group)
            rows, seen = group[0] + rows, group[1] | seen
        groups.append((sorted(rows), seen))
    return sorted(rows for rows, _ in groups)
