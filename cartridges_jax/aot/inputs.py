"""Arguments of the programs, as shapes with the shardings of a run's arrays."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from cartridges_jax import parallel
from cartridges_jax.aot.workload import Workload
from cartridges_jax.cartridge import KVPrefix, pad_slots
from cartridges_jax.data.packing import BATCH_DTYPES, TrainBatch, batch_shapes
from cartridges_jax.distill.learner import Learner, make_learner
from cartridges_jax.distill.settings import make_optimizer
from cartridges_jax.distill.sharding import batch_shardings, state_shardings
from cartridges_jax.distill.step import TrainState, new_state
from cartridges_jax.models import CACHE_AXES, Cache, empty_cache
from cartridges_jax.models.model import DTYPES, Model
from cartridges_jax.models.sharding import param_shardings
from cartridges_jax.models.weights import abstract_loaded
from cartridges_jax.sampling.buckets import prefix_bucket
from cartridges_jax.sampling.decoding import State, empty_state
from cartridges_jax.sampling.rows import Rows, rows_of

Shape = jax.ShapeDtypeStruct


def params(workload: Workload, mesh: Mesh) -> Any:
    return abstract_loaded(
        workload.config,
        DTYPES[workload.dtype],
        stored=workload.weights,
        sharding_of=param_shardings(workload.config, mesh),
    )


def _placed(mesh: Mesh, axes: tuple[str | None, ...], leaf: Any, *, in_use: bool = True) -> Shape:
    return Shape(leaf.shape, leaf.dtype, sharding=parallel.sharding(mesh, axes, leaf.shape, in_use=in_use))


def _everywhere(mesh: Mesh, tree: Any) -> Any:
    where = parallel.everywhere(mesh)
    return jax.tree.map(lambda leaf: Shape(leaf.shape, leaf.dtype, sharding=where), tree)


def _prefix(workload: Workload, num_slots: int) -> KVPrefix:
    config, slots = workload.config, Shape((num_slots,), jnp.int32)
    part = Shape((config.num_layers, config.num_kv_heads, num_slots, config.head_dim), DTYPES[workload.dtype])
    return KVPrefix(part, part, positions=slots, next_position=Shape((), jnp.int32))


def _placed_prefix(prefix: KVPrefix, mesh: Mesh, *, in_use: bool) -> KVPrefix:
    def placed(part: Shape, where: NamedSharding) -> Shape:
        return Shape(part.shape, part.dtype, sharding=where)

    shardings = parallel.prefix_shardings(mesh, prefix, in_use=in_use)
    return prefix.replace(**{name: placed(getattr(prefix, name), where) for name, where in shardings.items()})


def learner(workload: Workload) -> Learner:
    """The learner of the run's settings, with one frozen slot as in the paper."""
    return make_learner(workload.train.learner, num_frozen=1)


def _parts(workload: Workload, mesh: Mesh) -> tuple[Any, Any]:
    """The learner's frozen and trainable parts as shapes."""
    model = Model(
        workload.model, workload.config, params(workload, mesh), DTYPES[workload.dtype], cast(Any, None), cast(Any, None),
        mesh=mesh,
    )  # fmt: skip
    start = _prefix(workload, workload.num_slots)
    return jax.eval_shape(functools.partial(learner(workload).init, model), start)


def frozen(workload: Workload, mesh: Mesh) -> Any:
    """The learner's frozen part as the trainer places it."""

    def placed(part: Any) -> Any:
        return _placed_prefix(part, mesh, in_use=False) if isinstance(part, KVPrefix) else _everywhere(mesh, part)

    return jax.tree.map(placed, _parts(workload, mesh)[0], is_leaf=lambda part: isinstance(part, KVPrefix))


def state(workload: Workload, mesh: Mesh) -> TrainState:
    optimizer = make_optimizer(workload.train)
    _, trainable = _parts(workload, mesh)
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), trainable)
    shardings = state_shardings(mesh, optimizer, learner(workload), trainable)
    return jax.tree.map(lambda leaf, where: Shape(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)


def mask(workload: Workload, mesh: Mesh) -> Any:
    return _everywhere(mesh, jax.eval_shape(learner(workload).mask, *_parts(workload, mesh)))


def batch(workload: Workload, mesh: Mesh) -> TrainBatch:
    settings = workload.train
    num_micro, num_rows = settings.micro_batches, settings.rows_per_step // settings.micro_batches
    shapes = batch_shapes(
        num_micro, num_rows, settings.row_tokens, num_rows * workload.targets_per_row, workload.top_logprobs
    )
    described = zip(shapes, BATCH_DTYPES, batch_shardings(mesh), strict=True)
    return TrainBatch(*(Shape(shape, dtype, sharding=where) for shape, dtype, where in described))


def resident_prefix(workload: Workload, mesh: Mesh) -> KVPrefix:
    """A prefix in the engine's layout."""
    prefix = _prefix(workload, workload.prefix_slots)
    padded = jax.eval_shape(lambda prefix: pad_slots(prefix, prefix_bucket(prefix.num_slots)), prefix)
    return _placed_prefix(padded, mesh, in_use=True)


def _cache(mesh: Mesh, shapes: Cache) -> Cache:
    return Cache(
        _placed(mesh, CACHE_AXES, shapes.keys), _placed(mesh, CACHE_AXES, shapes.values),
        _placed(mesh, ("rows",), shapes.lengths),
    )  # fmt: skip


def reading_cache(workload: Workload, mesh: Mesh, num_rows: int, num_slots: int) -> Cache:
    shapes = jax.eval_shape(lambda: empty_cache(workload.config, num_rows, num_slots, DTYPES[workload.dtype]))
    return _cache(mesh, shapes)


def last_hidden(workload: Workload, mesh: Mesh, num_rows: int) -> Shape:
    return _placed(mesh, ("rows", None), Shape((num_rows, workload.config.d_model), DTYPES[workload.dtype]))


def chunk(mesh: Mesh, num_rows: int, num_tokens: int) -> Shape:
    """Tokens or segment ids [rows, tokens] that come from the host."""
    return Shape((num_rows, num_tokens), jnp.int32, sharding=parallel.everywhere(mesh))


def decode_state(workload: Workload, mesh: Mesh) -> State:
    num_rows, dtype = workload.decode_rows, DTYPES[workload.dtype]
    shapes = jax.eval_shape(lambda: empty_state(empty_cache(workload.config, num_rows, workload.own_slots, dtype)))
    per_row = {name: _placed(mesh, ("rows",), getattr(shapes, name)) for name in ("tokens", "num_generated", "running")}
    return State(cache=_cache(mesh, shapes.cache), **per_row)


def decode_rows(workload: Workload, mesh: Mesh) -> Rows:
    return _everywhere(mesh, rows_of([None] * workload.decode_rows))


def enough(mesh: Mesh) -> Shape:
    return Shape((), jnp.int32, sharding=parallel.everywhere(mesh))
