"""A sweep over all meshes of a topology."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cartridges_jax.aot.check import Check, check, mesh_of, with_micro_batches
from cartridges_jax.aot.topology import Topology
from cartridges_jax.aot.workload import Workload
from cartridges_jax.errors import UserError
from cartridges_jax.parallel import row_parts


def meshes(num_devices: int, workload: Workload) -> Iterator[str]:
    """Meshes of all devices whose data, fsdp and tensor axes split rows and heads evenly."""
    for tensor in range(1, num_devices + 1):
        if num_devices % tensor or workload.config.num_kv_heads % tensor:
            continue
        rows = num_devices // tensor
        if workload.train.rows_per_step % rows:
            continue
        for fsdp in range(1, rows + 1):
            if rows % fsdp == 0:
                yield f"data:{rows // fsdp},fsdp:{fsdp},tensor:{tensor}"


def rank(one: Check) -> tuple[bool, float, float, int]:
    """The sort key of a result: the best mesh first.

    Meshes that arithmetic bounds need the same time: of those the one that sends least is best, then the one with the
    least memory. A program that runs on a part of the mesh runs on all parts at once, so its time counts per device.
    Of results that do not fit, the one nearest to fitting comes first.
    """
    if not one.fits:
        return True, one.bytes_per_device, 0.0, 0
    seconds = one.roofline.seconds * one.num_devices
    return False, seconds, one.roofline.network * one.num_devices, one.bytes_per_device


def sweep(
    workload: Workload, topology: Topology, programs: Sequence[str], say: Callable[[Check], None] = lambda check: None
) -> dict[str, list[Check]]:
    """Compiles the programs for all meshes; returns the results of each program, the best first (`rank`).

    Args:
      say: called with every result when it is ready.

    Raises:
      UserError: no mesh splits the workload evenly.
    """
    lines = list(meshes(len(topology.devices), workload))
    if not lines:
        raise UserError(
            f"no mesh of {len(topology.devices)} devices splits {workload.train.rows_per_step} rows and "
            f"{workload.config.num_kv_heads} key/value heads evenly: change train.rows_per_step or the topology"
        )
    found: dict[str, list[Check]] = {program: [] for program in programs}
    for line in lines:
        mesh = mesh_of(line, topology)
        fitted = with_micro_batches(workload, row_parts(mesh))
        for program in programs:
            found[program].append(check(program, fitted, topology, mesh))
            say(found[program][-1])
    for checks in found.values():
        checks.sort(key=rank)
    return found
