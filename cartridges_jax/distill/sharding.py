"""Shardings of a training run's arrays on a mesh: the batch by rows, the state by the learner's axes."""

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
from cartridges_jax.data.packing import BATCH_AXES, PackingPlan, TrainBatch
from cartridges_jax.distill.learner import Learner
from cartridges_jax.distill.step import TrainState, train_step_function
from cartridges_jax.models import ModelConfig

# (params, frozen, mask, state, batch) -> (state, metrics): `train_step` with its static arguments bound.
Step = Callable[[Any, Any, Any, TrainState, TrainBatch], tuple[TrainState, dict[str, Array]]]


def batch_shardings(mesh: Mesh) -> TrainBatch:
    """Rows over data and fsdp, which divide the rows of a packing plan of that many `row_parts`."""
    parts = parallel.row_parts(mesh)
    return TrainBatch(*(parallel.sharding(mesh, axes, [parts] * len(axes)) for axes in BATCH_AXES))


def placed_batch(plan: PackingPlan, step: int, mesh: Mesh | None) -> TrainBatch:
    """The batch of a step on the devices, for which every process builds the rows of its own devices, once each.

    Args:
      plan: of the mesh's `row_parts`.
      step: from 0.
      mesh: None is the default device.
    """
    if mesh is None:
        return jax.device_put(plan.batch(step))
    part = functools.cache(functools.partial(plan.part, step))

    def placed(field: int, shape: tuple[int, ...], where: NamedSharding) -> Array:
        size = shape[1] // plan.row_parts

        def rows(index: Any) -> Any:
            return part((index[1].start or 0) // size)[field]

        return jax.make_array_from_callback(shape, where, rows)

    return TrainBatch(*map(placed, itertools.count(), plan.shapes, batch_shardings(mesh)))


def state_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, learner: Learner, trainable: Any
) -> TrainState:
    """The trainable arrays by the learner's axes; an optimizer's moments are split as the array they belong to.

    Args:
      mesh: the devices.
      optimizer: whose state is placed.
      learner: names the axes.
      trainable: of arrays or ShapeDtypeStructs.
    """
    everywhere = parallel.everywhere(mesh)
    split = jax.tree.map(
        lambda part, axes: parallel.sharding(mesh, axes, part.shape), trainable, learner.axes(trainable)
    )
    return TrainState(
        step=everywhere,
        trainable=split,
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, where: where,
            jax.eval_shape(optimizer.init, trainable),
            split,
            transform_non_params=lambda _: everywhere,
        ),
        refused=everywhere,
        refused_in_a_row=everywhere,
    )


def on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Replicates the arrays that are not on the mesh yet; without a mesh, returns the tree.

    A learner may add arrays of its own to a prefix that is placed already.
    """
    if mesh is None:
        return tree

    def placed(leaf: Any) -> Array:
        here = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if here else parallel.replicate(leaf, mesh)

    return jax.tree.map(placed, tree)


def undivided_slots(num_slots: int, mesh: Mesh) -> list[str]:
    """A sentence for the log if the mesh does not divide a cartridge's slots; else nothing."""
    if num_slots % mesh.shape["fsdp"] == 0:
        return []
    return [
        f"fsdp:{mesh.shape['fsdp']} does not divide the cartridge's {num_slots} slots: every device has all of them"
    ]


def step_on_mesh(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    learner: Learner,
    mesh: Mesh,
    params: Any,
    frozen: Any,
    state: TrainState,
    *,
    tail: str,
    remat: bool,
) -> Step:
    """Compiles the step with the shardings of its arguments and results.

    Args:
      config, optimizer, learner: as of `train_step`.
      mesh: the devices.
      params, frozen, state: arrays, or ShapeDtypeStructs, with the shardings that the step
        will be called with; the state is donated, and its successor has the same.
      tail, remat: as of `train_step`.
    """
    everywhere = parallel.everywhere(mesh)
    params, frozen, state = jax.tree.map(lambda part: part.sharding, (params, frozen, state))
    return jax.jit(
        functools.partial(train_step_function, config, optimizer, learner, tail=tail, remat=remat),
        in_shardings=(params, frozen, everywhere, state, batch_shardings(mesh)),
        out_shardings=(state, everywhere),
        donate_argnums=3,
    )
