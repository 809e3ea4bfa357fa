"""Every mesh of a topology, tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cartridges_jax.aot.check import Check, check, mesh_of, with_micro_batches
from cartridges_jax.aot.topology import Topology
from cartridges_jax.aot.workload import Workload
from cartridges_jax.errors import UserError
from cartridges_jax.parallel import row_parts


def meshes(num_devices: int, workload: Workload) -> Iterator[str]:
    """The ways to give all devices to data, fsdp and tensor that split rows and heads evenly."""
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
    """What a result is sorted by.

    Bound by arithmetic, meshes need the same time: of those the one that sends least is best, then the one that takes
    least memory. Parts of a mesh that run a program side by side do so many times its work. Of what does not fit, the
    nearest to fitting comes first.
    """
    if not one.fits:
        return True, one.bytes_per_device, 0.0, 0
    seconds = one.roofline.seconds * one.num_devices
    return False, seconds, one.roofline.network * one.num_devices, one.bytes_per_device


def sweep(
    workload: Workload, topology: Topology, programs: Sequence[str], say: Callable[[Check], None] = lambda check: None
) -> dict[str, list[Check]]:
    """All meshes, for each program from the best on: what fits before what does not, then by the time it takes.

    Args:
      say: called with every result as it comes.

    Raises:
      UserError: there is no mesh that splits the workload evenly.
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
