"""What programs are called with, as shapes that lie where a run's arrays would."""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from cartridges_jax import parallel
from cartridges_jax.ahead.draft import Draft
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.packing import BATCH_DTYPES, TrainBatch, batch_shapes
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


def params(draft: Draft, mesh: Mesh) -> Any:
    return abstract_loaded(
        draft.config, DTYPES[draft.dtype], stored=draft.weights, sharding_of=param_shardings(draft.config, mesh)
    )


def _placed(mesh: Mesh, axes: tuple[str | None, ...], leaf: Any, *, in_use: bool = True) -> Shape:
    return Shape(leaf.shape, leaf.dtype, sharding=parallel.sharding(mesh, axes, leaf.shape, in_use=in_use))


def _everywhere(mesh: Mesh, tree: Any) -> Any:
    where = parallel.everywhere(mesh)
    return jax.tree.map(lambda leaf: Shape(leaf.shape, leaf.dtype, sharding=where), tree)


def _prefix(draft: Draft, num_slots: int) -> KVPrefix:
    config, slots = draft.config, Shape((num_slots,), jnp.int32)
    part = Shape((config.num_layers, config.num_kv_heads, num_slots, config.head_dim), DTYPES[draft.dtype])
    return KVPrefix(part, part, slots, slots, next_position=num_slots)


def _placed_prefix(prefix: KVPrefix, mesh: Mesh, *, in_use: bool) -> KVPrefix:
    def placed(part: Shape, where: NamedSharding) -> Shape:
        return Shape(part.shape, part.dtype, sharding=where)

    shardings = parallel.prefix_shardings(mesh, prefix, in_use=in_use)
    return prefix.replace(**{name: placed(getattr(prefix, name), where) for name, where in shardings.items()})


def frozen(draft: Draft, mesh: Mesh) -> KVPrefix:
    """The cartridge as training starts from it."""
    return _placed_prefix(_prefix(draft, draft.num_slots), mesh, in_use=False)


def state(draft: Draft, mesh: Mesh) -> TrainState:
    optimizer = make_optimizer(draft.train)
    trainable = jax.eval_shape(cartridge_trainable, _prefix(draft, draft.num_slots))
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), trainable)
    shardings = state_shardings(mesh, optimizer, trainable)
    return jax.tree.map(lambda leaf, where: Shape(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)


def mask(draft: Draft, mesh: Mesh) -> Shape:
    return _everywhere(mesh, jax.eval_shape(lambda: learning_mask(draft.num_slots, 1)[:, None]))


def batch(draft: Draft, mesh: Mesh) -> TrainBatch:
    settings = draft.train
    num_micro, num_rows = settings.micro_batches, settings.rows_per_step // settings.micro_batches
    shapes = batch_shapes(num_micro, num_rows, settings.row_tokens, num_rows * draft.targets_per_row, draft.top_logprobs)
    described = zip(shapes, BATCH_DTYPES, batch_shardings(mesh), strict=True)
    return TrainBatch(*(Shape(shape, dtype, sharding=where) for shape, dtype, where in described))


def front(draft: Draft, mesh: Mesh) -> Front:
    """A prefix as the engine keeps it."""
    shapes = jax.eval_shape(functools.partial(as_front, dtype=DTYPES[draft.dtype]), _prefix(draft, draft.front_slots))
    return Front(_placed_prefix(shapes.prefix, mesh, in_use=True), _everywhere(mesh, shapes.start))


def _cache(mesh: Mesh, shapes: Cache) -> Cache:
    return Cache(
        _placed(mesh, CACHE_AXES, shapes.keys), _placed(mesh, CACHE_AXES, shapes.values),
        _placed(mesh, ("rows",), shapes.lengths),
    )  # fmt: skip


def reading_cache(draft: Draft, mesh: Mesh, num_rows: int, num_slots: int) -> Cache:
    shapes = jax.eval_shape(lambda: empty_cache(draft.config, num_rows, num_slots, DTYPES[draft.dtype]))
    return _cache(mesh, shapes)


def last_hidden(draft: Draft, mesh: Mesh, num_rows: int) -> Shape:
    return _placed(mesh, ("rows", None), Shape((num_rows, draft.config.d_model), DTYPES[draft.dtype]))


def chunk(mesh: Mesh, num_rows: int, num_tokens: int) -> Shape:
    """Tokens, or segment ids, as the host hands them over."""
    return Shape((num_rows, num_tokens), jnp.int32, sharding=parallel.everywhere(mesh))


def decode_state(draft: Draft, mesh: Mesh) -> State:
    shapes = jax.eval_shape(
        lambda: empty_state(draft.config, draft.pod.decode_rows, draft.own_slots, DTYPES[draft.dtype])
    )
    per_row = {name: _placed(mesh, ("rows",), getattr(shapes, name)) for name in ("tokens", "num_generated", "running")}
    return State(cache=_cache(mesh, shapes.cache), **per_row)


def decode_rows(draft: Draft, mesh: Mesh) -> Rows:
    return _everywhere(mesh, rows_of([None] * draft.pod.decode_rows))


def enough(mesh: Mesh) -> Shape:
    return Shape((), jnp.int32, sharding=parallel.everywhere(mesh))
