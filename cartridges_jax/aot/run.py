"""The ahead-of-time check of a run: compiles its programs and prints tables and JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from cartridges_jax.aot import sweep as sweeps
from cartridges_jax.aot.check import Check, check, mesh_of
from cartridges_jax.aot.programs import DEFAULT_PROGRAMS, PROGRAMS
from cartridges_jax.aot.scaling import scale, scaling_table
from cartridges_jax.aot.tables import checks_table
from cartridges_jax.aot.throughput import throughput_table
from cartridges_jax.aot.topology import Topology, find
from cartridges_jax.aot.workload import Workload
from cartridges_jax.errors import UserError


def run(workload: Workload, *, programs: Sequence[str] = (), sweep: bool = False, scaling: bool = False) -> list[Check]:
    """Compiles a workload's programs, prints a table, then one JSON line for each program.

    Args:
      programs: members of `PROGRAMS`; `DEFAULT_PROGRAMS` if empty.
      sweep: tries all meshes of the topology; the JSON lines are those of each program's best mesh.
      scaling: projects the train step from 1 to 512 chips of the topology's kind instead.

    Raises:
      UserError: an unknown program or topology, or a mesh that does not fit it.
    """
    programs = programs or DEFAULT_PROGRAMS
    for program in programs:
        if program not in PROGRAMS:
            raise UserError(f"there is no program {program!r}: choose from {', '.join(PROGRAMS)}")
    topology = find(workload.topology)
    if topology.stand_in:
        _say("the compiler for GPUs is not installed: compiling for CPU devices instead, whose memory is not a GPU's")
    if scaling:
        print(
            scaling_table(
                scale(workload, topology.chip, say=lambda point: _say(f"{point.layout}: {point.num_devices} devices"))
            )
        )
        return []
    if sweep:
        checks = _swept(workload, topology, programs)
    else:
        mesh = mesh_of(workload.mesh, topology)
        checks = [check(program, workload, topology, mesh) for program in programs]
        print(checks_table(checks))
    if sweep or "decode" in programs:
        print(
            f"\nDecoding after {workload.num_slots:,} slots or {workload.visible_tokens:,} tokens of text, with "
            f"{workload.own_slots} slots for each conversation:\n"
        )
        print(throughput_table(workload))
    print()
    for one in checks:
        print(json.dumps(one.record()), flush=True)
    return checks


def _swept(workload: Workload, topology: Topology, programs: Sequence[str]) -> list[Check]:
    found = sweeps.sweep(
        workload, topology, programs, say=lambda one: _say(f"{one.program} on {one.mesh}: {one.compile_seconds:.0f} s")
    )
    print(checks_table([one for checks in found.values() for one in checks]))
    return [checks[0] for checks in found.values()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
