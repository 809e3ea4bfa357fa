"""One program compiled for one mesh of a topology: its memory, collectives and least time."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from jax.sharding import Mesh

from cartridges_jax.aot import hlo
from cartridges_jax.aot.programs import compile_program, mesh_of_program
from cartridges_jax.aot.roofline import Roofline, flops_per_device, roofline
from cartridges_jax.aot.topology import Topology, as_own_slice
from cartridges_jax.aot.workload import Workload
from cartridges_jax.errors import UserError
from cartridges_jax.parallel import make_mesh
from cartridges_jax.sampling.engine import STEPS_PER_DISPATCH


@dataclasses.dataclass(frozen=True)
class Check:
    """A compiled program: memory, collectives and least time.

    Attributes:
      program: one of `programs.PROGRAMS`.
      topology: the devices compiled for.
      mesh: the run's mesh, as `parallel.make_mesh` takes it.
      num_devices: devices that the program runs on, all of the mesh's or those of a part of it.
      micro_batches: number of micro-batches of a train step.
      bytes_per_device: peak memory.
      sent: its collectives; None if the program does not fit, because the compiler then gives no program.
      flops_per_device: analytic count.
      roofline: the least seconds; without the network's where `sent` is None.
      compile_seconds: seconds of tracing and compilation.
    """

    program: str
    topology: Topology
    mesh: str
    num_devices: int
    micro_batches: int
    bytes_per_device: int
    sent: list[hlo.Collective] | None
    flops_per_device: float
    roofline: Roofline
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.bytes_per_device <= self.topology.chip.memory_bytes and self.sent is not None

    @property
    def collective_bytes(self) -> float | None:
        """Bytes that a device sends in one run of the program."""
        return None if self.sent is None else sum(one.times * one.sent for one in self.sent)

    def record(self) -> dict[str, Any]:
        """The fields of the JSON line."""
        counts = None
        if self.sent is not None:
            counts = collections.Counter()
            for one in self.sent:
                counts[one.kind] += one.times
        found = {
            "program": self.program,
            "topology": self.topology.name,
            "devices": self.num_devices,
            "mesh": self.mesh,
            "bytes_per_device": self.bytes_per_device,
            "fits": self.fits,
            "collectives": None if counts is None else dict(sorted(counts.items())),
            "collective_bytes": None if self.sent is None else round(self.collective_bytes),
            "flops_per_device": round(self.flops_per_device),
            "roofline_seconds": float(f"{self.roofline.seconds:.4g}"),
            "bound_by": self.roofline.bound_by,
            "compile_seconds": round(self.compile_seconds, 1),
        }
        if self.topology.stand_in:
            found["compiled_for"] = "cpu: memory and collectives are those of CPU devices instead of GPUs"
        return found


def check(program: str, workload: Workload, topology: Topology, mesh: Mesh) -> Check:
    """Compiles a program and measures it.

    Raises:
      UserError: the mesh does not divide the rows, or divides no part of the model.
    """
    part = mesh_of_program(program, mesh)
    compiled = compile_program(program, workload, as_own_slice(part, topology))
    sent = None
    if compiled.text:
        # A dispatch decodes this many tokens; the HLO states the length of every other loop.
        sent = hlo.collectives(compiled.text, trips_of_open_loops=STEPS_PER_DISPATCH if program == "decode" else None)
    return Check(
        program=program,
        topology=topology,
        mesh=mesh_line(mesh),
        num_devices=part.devices.size,
        micro_batches=workload.train.micro_batches,
        bytes_per_device=compiled.bytes_per_device,
        sent=sent,
        flops_per_device=flops_per_device(program, workload, part),
        roofline=roofline(program, workload, part, topology, sent or ()),
        compile_seconds=compiled.seconds,
    )


def mesh_line(mesh: Mesh) -> str:
    """The text of a mesh that `parallel.make_mesh` takes, without axes of one device."""
    return ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1) or "data:1"


def mesh_of(line: str, topology: Topology) -> Mesh:
    """The mesh that a text describes on all devices of a topology; for an empty text, `data` over all of them.

    Raises:
      UserError: as `parallel.make_mesh`.
    """
    return make_mesh(line or "data:-1", topology.devices)


def with_micro_batches(workload: Workload, parts: int) -> Workload:
    """The workload with its micro-batches, or fewer if the mesh's parts have fewer rows each.

    Args:
      parts: number of parts that a mesh splits the rows into.

    Raises:
      UserError: the rows of a step do not divide into the parts.
    """
    settings = workload.train
    if settings.rows_per_step % parts:
        raise UserError(f"{settings.rows_per_step} rows a step are not divisible into {parts} parts")
    per_part = settings.rows_per_step // parts
    most = max(number for number in range(1, settings.micro_batches + 1) if per_part % number == 0)
    return dataclasses.replace(workload, train=dataclasses.replace(settings, micro_batches=most))
