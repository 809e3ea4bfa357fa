"""What programs are called with, as shapes that lie where a run's arrays would."""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cartridges_jax import parallel
from cartridges_jax.ahead.job import Job
from cartridges_jax.cartridge import PREFIX_AXES, KVPrefix
from cartridges_jax.data.packing import TrainBatch
from cartridges_jax.distill.sharding import batch_shardings, state_shardings
from cartridges_jax.distill.step import TrainState, cartridge_trainable, learning_mask, new_state
from cartridges_jax.distill.trainer import make_optimizer
from cartridges_jax.models import CACHE_AXES, Cache, empty_cache
from cartridges_jax.models.model import DTYPES
from cartridges_jax.models.sharding import param_shardings
from cartridges_jax.models.weights import abstract_loaded
from cartridges_jax.sampling.group import rows_of
from cartridges_jax.sampling.programs import Front, Rows, State, as_front, empty_state

Shape = jax.ShapeDtypeStruct


def params(job: Job, mesh: Mesh) -> Any:
    return abstract_loaded(
        job.config, DTYPES[job.dtype], stored=job.weights, sharding_of=param_shardings(job.config, mesh)
    )


def _placed(mesh: Mesh, axes: tuple[str | None, ...], leaf: Any, *, in_use: bool = True) -> Shape:
    return Shape(leaf.shape, leaf.dtype, sharding=parallel.sharding(mesh, axes, leaf.shape, in_use=in_use))


def _everywhere(mesh: Mesh, tree: Any) -> Any:
    where = parallel.everywhere(mesh)
    return jax.tree.map(lambda leaf: Shape(leaf.shape, leaf.dtype, sharding=where), tree)


def _prefix(job: Job) -> KVPrefix:
    config, slots = job.config, Shape((job.num_slots,), jnp.int32)
    part = Shape((config.num_layers, config.num_kv_heads, job.num_slots, config.head_dim), DTYPES[job.dtype])
    return KVPrefix(part, part, slots, slots, next_position=job.num_slots)


def _placed_prefix(prefix: KVPrefix, mesh: Mesh, *, in_use: bool) -> KVPrefix:
    parts = {name: getattr(prefix, name) for name in PREFIX_AXES}
    return prefix.replace(**{
        name: _placed(mesh, PREFIX_AXES[name], part, in_use=in_use) for name, part in parts.items() if part is not None
    })


def frozen(job: Job, mesh: Mesh) -> KVPrefix:
    """The cartridge as training starts from it."""
    return _placed_prefix(_prefix(job), mesh, in_use=False)


def state(job: Job, mesh: Mesh) -> TrainState:
    optimizer = make_optimizer(job.train)
    trainable = jax.eval_shape(cartridge_trainable, _prefix(job))
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), trainable)
    shardings = state_shardings(mesh, optimizer, trainable)
    return jax.tree.map(lambda leaf, where: Shape(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)


def mask(job: Job, mesh: Mesh) -> Shape:
    return _everywhere(mesh, jax.eval_shape(lambda: learning_mask(job.num_slots, 1)[:, None]))


def batch(job: Job, mesh: Mesh) -> TrainBatch:
    settings = job.train
    num_micro, num_rows = settings.micro_batches, settings.rows_per_step // settings.micro_batches
    tokens = (num_micro, num_rows, settings.row_tokens)
    targets = (num_micro, num_rows * job.targets_per_row)
    entries = (*targets, job.top_logprobs)
    shapes = TrainBatch(
        tokens=(tokens, jnp.int32), positions=(tokens, jnp.int32), segment_ids=(tokens, jnp.int32),
        rows=(targets, jnp.int32), ids=(entries, jnp.int32), logprobs=(entries, jnp.float32), weight=(targets, jnp.float32),
    )  # fmt: skip
    return TrainBatch(*(Shape(*shape, sharding=where) for shape, where in zip(shapes, batch_shardings(mesh), strict=True)))


def front(job: Job, mesh: Mesh) -> Front:
    """The cartridge as the engine keeps it."""
    shapes = jax.eval_shape(functools.partial(as_front, dtype=DTYPES[job.dtype]), _prefix(job))
    return Front(_placed_prefix(shapes.prefix, mesh, in_use=True), _everywhere(mesh, shapes.start))


def _cache(job: Job, mesh: Mesh, shapes: Cache) -> Cache:
    return Cache(
        _placed(mesh, CACHE_AXES, shapes.keys), _placed(mesh, CACHE_AXES, shapes.values),
        _placed(mesh, ("rows",), shapes.lengths),
    )  # fmt: skip


def reading_cache(job: Job, mesh: Mesh, num_rows: int, num_slots: int) -> Cache:
    shapes = jax.eval_shape(lambda: empty_cache(job.config, num_rows, num_slots, DTYPES[job.dtype]))
    return _cache(job, mesh, shapes)


def last_hidden(job: Job, mesh: Mesh, num_rows: int) -> Shape:
    return _placed(mesh, ("rows", None), Shape((num_rows, job.config.d_model), DTYPES[job.dtype]))


def chunk(mesh: Mesh, num_rows: int, num_tokens: int) -> Shape:
    """Tokens, or segment ids, as the host hands them over."""
    return Shape((num_rows, num_tokens), jnp.int32, sharding=parallel.everywhere(mesh))


def decode_state(job: Job, mesh: Mesh) -> State:
    shapes = jax.eval_shape(
        lambda: empty_state(job.config, job.pod.decode_rows, job.own_slots, DTYPES[job.dtype])
    )
    per_row = {name: _placed(mesh, ("rows",), getattr(shapes, name)) for name in ("tokens", "num_generated", "running")}
    return State(cache=_cache(job, mesh, shapes.cache), **per_row)


def decode_rows(job: Job, mesh: Mesh) -> Rows:
    return _everywhere(mesh, rows_of([None] * job.pod.decode_rows))


def enough(mesh: Mesh) -> Shape:
    return Shape((), jnp.int32, sharding=parallel.everywhere(mesh))
