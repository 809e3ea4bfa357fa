"""Scaling of a train step from one chip to 512: memory and time of each layout, and where it stops to pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from cartridges_jax.aot.check import Check, check, mesh_of, with_micro_batches
from cartridges_jax.aot.hardware import Chip
from cartridges_jax.aot.tables import table
from cartridges_jax.aot.topology import of_size
from cartridges_jax.aot.workload import Workload
from cartridges_jax.errors import UserError
from cartridges_jax.parallel import row_parts

SIZES = tuple(2**power for power in range(10))
# Below this efficiency more devices no longer pay.
_WORTH = 0.5


def _tensor_first(number: int, most: int) -> str:
    tensor = min(number, most)
    return f"data:{number // tensor},tensor:{tensor}"


LAYOUTS: Mapping[str, Callable[[int], str]] = {
    "data": lambda number: f"data:{number}",
    "fsdp": lambda number: f"fsdp:{number}",
    "tensor": lambda number: f"tensor:{number}",
    "tensor 4, then data": lambda number: _tensor_first(number, 4),
    "tensor 8, then data": lambda number: _tensor_first(number, 8),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One layout on one number of devices.

    Attributes:
      layout: a key of `LAYOUTS`.
      num_devices: number of devices.
      check: the compiled step; None if there is none.
      stops: the reason why more devices gain nothing, or why there is no program; "" if they gain. A step that does not
        fit may fit on more devices.
      efficiency: projected speed over that of perfect scaling from the smallest number of devices on which the layout
        fits.
    """

    layout: str
    num_devices: int
    check: Check | None
    stops: str = ""
    efficiency: float | None = None


def scale(
    workload: Workload,
    chip: Chip,
    *,
    sizes: Sequence[int] = SIZES,
    layouts: Sequence[str] = tuple(LAYOUTS),
    say: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Projects the train step of a workload, with the same rows, to more and more devices.

    Args:
      say: called with every point when it is ready.
    """
    points = []
    for layout in layouts:
        first: Check | None = None
        for number in sizes:
            point = _point(workload, chip, layout, number, first)
            points.append(point)
            say(point)
            if first is None and point.check is not None and point.check.fits:
                first = point.check
            # More devices do not bring back rows or heads that have run out.
            if point.check is None:
                break
    return points


def _point(workload: Workload, chip: Chip, layout: str, number: int, first: Check | None) -> Point:
    line, reason = LAYOUTS[layout](number), ""
    try:
        topology = of_size(chip, number)
        mesh = mesh_of(line, topology)
        reason = _run_out(workload, mesh)
    except UserError as error:
        reason = str(error)
    if reason:
        return Point(layout, number, None, reason)
    found = check("train", with_micro_batches(workload, row_parts(mesh)), topology, mesh)
    if not found.fits:
        return Point(layout, number, found, "does not fit")
    if first is None:
        return Point(layout, number, found, efficiency=1.0)
    before = len(first.topology.devices)
    efficiency = first.roofline.seconds * before / (found.roofline.seconds * number)
    stops = ""
    if efficiency < _WORTH:
        stops = {
            "network": "collectives take longer than arithmetic",
            "memory": "every device still reads its part of the weights",
            "compute": "devices repeat each other's arithmetic",
        }[found.roofline.bound_by]
    return Point(layout, number, found, stops, efficiency)


def _run_out(workload: Workload, mesh) -> str:
    """The reason why a mesh cannot split the workload evenly; "" if it can."""
    tensor, rows = mesh.shape["tensor"], row_parts(mesh)
    if workload.config.num_kv_heads % tensor:
        return f"{workload.config.num_kv_heads} key/value heads do not divide by {tensor}"
    if workload.train.rows_per_step % rows:
        return f"{workload.train.rows_per_step} rows a step do not divide by {rows}"
    return ""


def scaling_table(points: Sequence[Point]) -> str:
    """A Markdown table with a row for each point."""
    head = (
        "layout",
        "devices",
        "GiB a device",
        "TFLOP a device",
        "GiB sent",
        "step",
        "bound by",
        "efficiency",
        "stops because",
    )
    rows = []
    for point in points:
        one = point.check
        if one is None:
            rows.append((point.layout, str(point.num_devices), *[""] * 6, point.stops))
            continue
        known = one.sent is not None
        rows.append(
            (
                point.layout,
                str(point.num_devices),
                f"{one.bytes_per_device / 2**30:.2f}",
                f"{one.flops_per_device / 1e12:.1f}",
                f"{one.collective_bytes / 2**30:.2f}" if known else "",
                f"{one.roofline.seconds:.3g} s" if known else "",
                one.roofline.bound_by if known else "",
                "" if point.efficiency is None else f"{point.efficiency:.0%}",
                point.stops,
            )
        )
    return table(head, rows)
