"""The least time that a device needs for arithmetic, memory traffic and collectives.

The three are assumed to overlap fully, so the longest of them bounds the program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from cartridges_jax.aot import inputs
from cartridges_jax.aot.hlo import Collective
from cartridges_jax.aot.network import links_of, network_seconds
from cartridges_jax.aot.programs import prefill_shape, whole_text_shape
from cartridges_jax.aot.topology import Topology
from cartridges_jax.aot.workload import Workload
from cartridges_jax.models.costs import (
    Work,
    distillation_work,
    forward_work,
    keys_seen,
    kv_bytes_per_token,
    weights_read,
)
from cartridges_jax.models.model import DTYPES
from cartridges_jax.parallel.rules import parts_on
from cartridges_jax.sampling.engine import STEPS_PER_DISPATCH


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of arithmetic, memory traffic and collectives."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def bound_by(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(program: str, workload: Workload, mesh: Mesh, topology: Topology, sent: Iterable[Collective]) -> Roofline:
    chip = topology.chip
    return Roofline(
        compute=flops_per_device(program, workload, mesh) / chip.flops,
        memory=memory_bytes(program, workload, mesh) / chip.memory_bandwidth,
        network=network_seconds(sent, links_of(topology, mesh)),
    )


# Arithmetic


def total_work(program: str, workload: Workload) -> Work:
    """Operations of a program on all devices, including layers that are recomputed for the backward pass."""
    config, settings = workload.config, workload.train
    if program == "train":
        rows = settings.rows_per_step
        return distillation_work(
            config,
            workload.row_lengths * rows,
            rows * workload.targets_per_row,
            workload.num_slots,
            recomputed=settings.remat,
        )
    if program == "prefill":
        num_rows, tokens, _ = prefill_shape(workload)
        return forward_work(config, num_rows * tokens, 0, num_rows * keys_seen([tokens], workload.prefix_slots))
    if program == "whole_text":
        # The last chunk attends to the most keys.
        tokens, num_slots = whole_text_shape(workload)
        return forward_work(config, tokens, 0, keys_seen([tokens], num_slots - tokens))
    num_rows = workload.decode_rows
    step = forward_work(config, num_rows, num_rows, num_rows * (workload.prefix_slots + workload.own_slots))
    return Work(*(STEPS_PER_DISPATCH * part for part in step))


def flops_per_device(program: str, workload: Workload, mesh: Mesh) -> float:
    """Operations of one device; every device does in full what the mesh does not divide."""
    work, config = total_work(program, workload), workload.config
    by_layer = (
        work.heads / parts_on(mesh, "kv_heads", config.num_kv_heads)
        + work.mlp / parts_on(mesh, "mlp", config.d_ff)
        + work.vocab / parts_on(mesh, "vocab", config.vocab_size)
    )
    return by_layer / _row_parts(program, workload, mesh)


def _row_parts(program: str, workload: Workload, mesh: Mesh) -> int:
    num_rows = {
        "train": workload.train.rows_per_step // workload.train.micro_batches,
        "prefill": prefill_shape(workload)[0],
        "decode": workload.decode_rows,
        "whole_text": 1,
    }[program]
    return parts_on(mesh, "rows", num_rows)


# Memory


def memory_bytes(program: str, workload: Workload, mesh: Mesh) -> float:
    """The least bytes that a device reads and writes: weights, prefix, caches, and the optimizer's state.

    Activations are not counted: the compiler decides which of them leave the chip.
    """
    weights = _weight_bytes(workload, mesh)
    per_slot = kv_bytes_per_token(workload.config, DTYPES[workload.dtype]) / parts_on(
        mesh, "kv_heads", workload.config.num_kv_heads
    )
    by_rows = _row_parts(program, workload, mesh)
    if program == "train":
        # Every micro-batch passes forward, again if layers are recomputed, and backward. The optimizer reads
        # and writes the slots and its two moments, in float32.
        passes = workload.train.micro_batches * (2 + workload.train.remat)
        state = 3 * 2 * kv_bytes_per_token(workload.config, "float32") * workload.num_slots
        split = parts_on(mesh, "kv_heads", workload.config.num_kv_heads) * parts_on(
            mesh, "slots", workload.num_slots, in_use=False
        )
        return passes * (weights + per_slot * workload.num_slots) + state / split
    if program == "whole_text":
        return weights + per_slot * whole_text_shape(workload)[1]
    prefix = per_slot * workload.prefix_slots
    if program == "prefill":
        num_rows, _, num_slots = prefill_shape(workload)
        return weights + prefix + per_slot * num_slots * num_rows / by_rows
    return STEPS_PER_DISPATCH * (weights + prefix + per_slot * workload.own_slots * workload.decode_rows / by_rows)


def _weight_bytes(workload: Workload, mesh: Mesh) -> float:
    """Bytes of weights that a device reads in one pass: its tensor part, after fsdp's gathering if there is one."""
    read = weights_read(workload.config, inputs.params(workload, mesh))
    return sum(_bytes_in_use(leaf, mesh) for leaf in jax.tree.leaves(read))


def _bytes_in_use(leaf: Any, mesh: Mesh) -> float:
    held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    axes = {name for part in leaf.sharding.spec if part for name in ((part,) if isinstance(part, str) else part)}
    return held * mesh.shape["fsdp"] if "fsdp" in axes else held
