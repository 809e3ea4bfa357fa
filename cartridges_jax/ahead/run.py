"""What `launch/compile_ahead.py` does."""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from cartridges_jax.ahead import sweep as sweeps
from cartridges_jax.ahead.check import Check, check, mesh_of
from cartridges_jax.ahead.draft import Draft
from cartridges_jax.ahead.programs import DEFAULT_PROGRAMS, PROGRAMS
from cartridges_jax.ahead.scaling import scale, scaling_table
from cartridges_jax.ahead.tables import checks_table
from cartridges_jax.ahead.throughput import throughput_table
from cartridges_jax.ahead.topology import Topology, find
from cartridges_jax.errors import UserError


def run(draft: Draft, *, programs: Sequence[str] = (), sweep: bool = False, scaling: bool = False) -> list[Check]:
    """Compiles a draft's programs and prints what comes of it, one JSON line for each at the end.

    Args:
      programs: of `PROGRAMS`; `DEFAULT_PROGRAMS` if none are named.
      sweep: tries all meshes of the topology; the lines are those of each program's best.
      scaling: projects the train step from 1 to 512 chips of the topology's kind instead.

    Raises:
      UserError: an unknown program or topology, or a mesh that does not suit it.
    """
    programs = programs or DEFAULT_PROGRAMS
    for program in programs:
        if program not in PROGRAMS:
            raise UserError(f"there is no program {program!r}: choose from {', '.join(PROGRAMS)}")
    topology = find(draft.pod.topology)
    if topology.stand_in:
        _say("the compiler for GPUs is not installed: CPU devices stand in, and say nothing of a GPU's memory")
    if scaling:
        print(scaling_table(scale(draft, topology.chip, say=lambda point: _say(f"{point.layout}: {point.num_devices} devices"))))
        return []
    if sweep:
        checks = _swept(draft, topology, programs)
    else:
        mesh = mesh_of(draft.mesh, topology)
        checks = [check(program, draft, topology, mesh) for program in programs]
        print(checks_table(checks))
    if sweep or "decode" in programs:
        print(f"\nDecoding behind {draft.num_slots:,} slots or {draft.context_tokens:,} tokens, {draft.own_slots} their own:\n")
        print(throughput_table(draft))
    print()
    for one in checks:
        print(json.dumps(one.record()), flush=True)
    return checks


def _swept(draft: Draft, topology: Topology, programs: Sequence[str]) -> list[Check]:
    found = sweeps.sweep(
        draft, topology, programs, say=lambda one: _say(f"{one.program} on {one.mesh}: {one.compile_seconds:.0f} s")
    )
    print(checks_table([one for checks in found.values() for one in checks]))
    return [checks[0] for checks in found.values()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
