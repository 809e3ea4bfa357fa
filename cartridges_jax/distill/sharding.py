"""Where a training run's arrays lie on a mesh: the batch by rows, the state by heads and slots."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from cartridges_jax import parallel
from cartridges_jax.cartridge import PREFIX_AXES, KVPrefix
from cartridges_jax.data.packing import BATCH_AXES, PackingPlan, TrainBatch
from cartridges_jax.distill.step import Combine, TrainState, train_step_function
from cartridges_jax.models import ModelConfig

# (params, frozen, mask, state, batch) -> (state, metrics): `train_step` behind its static arguments.
Step = Callable[[Any, KVPrefix, Array, TrainState, TrainBatch], tuple[TrainState, dict[str, Array]]]


def batch_shardings(mesh: Mesh) -> TrainBatch:
    """Rows over data and fsdp; a packing plan of `row_parts` sees to it that they divide."""
    parts = parallel.row_parts(mesh)
    return TrainBatch(*(parallel.sharding(mesh, axes, [parts] * len(axes)) for axes in BATCH_AXES))


def placed_batch(plan: PackingPlan, step: int, mesh: Mesh | None) -> TrainBatch:
    """The batch of a step on the devices: every process makes the rows that lie on its own, and no others.

    Args:
      plan: of the mesh's `row_parts`.
    """
    if mesh is None:
        return jax.device_put(plan.batch(step))
    part = functools.cache(functools.partial(plan.part, step))

    def placed(field: int, shape: tuple[int, ...], where: NamedSharding) -> Array:
        size = shape[1] // plan.row_parts
        return jax.make_array_from_callback(shape, where, lambda index: part((index[1].start or 0) // size)[field])

    return TrainBatch(*map(placed, itertools.count(), plan.shapes, batch_shardings(mesh)))


def state_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, trainable: dict[str, Array]) -> TrainState:
    """A cartridge's heads over tensor and slots over fsdp; what the optimizer keeps of an array lies as the array."""
    everywhere = parallel.everywhere(mesh)
    slots = {name: parallel.sharding(mesh, PREFIX_AXES[name], part.shape) for name, part in trainable.items()}
    return TrainState(
        step=everywhere,
        trainable=slots,
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, where: where,
            jax.eval_shape(optimizer.init, trainable),
            slots,
            transform_non_params=lambda _: everywhere,
        ),
        refused=everywhere,
        refused_in_a_row=everywhere,
    )


def undivided_slots(num_slots: int, mesh: Mesh) -> list[str]:
    """Words, if the mesh does not divide a cartridge's slots and every device has all of them."""
    if num_slots % mesh.shape["fsdp"] == 0:
        return []
    return [
        f"fsdp:{mesh.shape['fsdp']} does not divide the cartridge's {num_slots} slots: every device has all of them"
    ]


def step_on_mesh(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    combine: Combine,
    mesh: Mesh,
    params: Any,
    frozen: KVPrefix,
    state: TrainState,
    *,
    tail: str,
    remat: bool,
) -> Step:
    """The step, with the shardings of all that goes in and comes out.

    Args:
      params, frozen, state: arrays, or ShapeDtypeStructs, that lie where the step will find
        them; the state is donated, and its successor lies where it did.
    """
    everywhere = parallel.everywhere(mesh)
    params, frozen, state = jax.tree.map(lambda part: part.sharding, (params, frozen, state))
    return jax.jit(
        functools.partial(train_step_function, config, optimizer, combine, tail=tail, remat=remat),
        in_shardings=(params, frozen, everywhere, state, batch_shardings(mesh)),
        out_shardings=(state, everywhere),
        donate_argnums=3,
    )
