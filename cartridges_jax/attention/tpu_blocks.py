"""Shared parts of the TPU kernels: operands in blocks, and the scores of one block.

A kernel sees one query head's block of tokens against one block of keys. The forward and
the dq kernel lay scores out as [queries, keys], the two dkv kernels as [keys, queries], so
that no product transposes a [block, block] operand. `query_axis` is the axis of the queries.

Values per token or slot (segment, position, bias, maximum) are stored as a row [1, n], which
takes 1/128 of the memory of a column on a TPU, and reshaped to a column where needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cartridges_jax.attention.scores import MASKED, capped

LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of a call.

    Attributes:
      block: tokens of a block of queries, and of one of own keys.
      num_blocks: T / block.
      prefix_block: slots of a block of the prefix.
      num_prefix_blocks: P / prefix_block; 0 without a prefix.
      queries_per_kv: G, query heads that read one key head.
      window, softcap: as in `attention.attend`; 0 is off.
      interpret: run by Pallas' interpreter.
    """

    block: int
    num_blocks: int
    prefix_block: int
    num_prefix_blocks: int
    queries_per_kv: int
    window: int
    softcap: float
    interpret: bool


class Tokens(NamedTuple):
    """The side of the queries: scaled queries [B, N, T, H]; segments, positions [B, 1, T]."""

    queries: Any
    segments: Any
    positions: Any | None


class Own(NamedTuple):
    """The rows' own keys, values [B, K, T, H]; segments, positions [B, 1, T]."""

    keys: Any
    values: Any
    segments: Any
    positions: Any | None


class Prefix(NamedTuple):
    """The prefix: keys, values [K, P, H]; bias [K, 1, P] float32; positions [1, P].

    The bias of slots that only fill the last block is `MASKED`.
    """

    keys: Any
    values: Any
    bias: Any
    positions: Any | None


class Upstream(NamedTuple):
    """The upstream gradient in the terms of the whole softmax.

    Attributes:
      gradient: [B, N, T, H], of the output, divided by `total`.
      maximum: [B, N, 1, T] float32, of the scores of prefix and own slots together.
      delta: [B, N, 1, T] float32, sum of gradient * output.
    """

    gradient: Any
    maximum: Any
    delta: Any


class Place(NamedTuple):
    """The blocks that one step of a kernel's grid reads or writes."""

    row: Any = 0
    head: Any = 0
    kv_head: Any = 0
    queries: Any = 0
    own: Any = 0
    prefix: Any = 0


# Grid indices, then scalar operands, to a place.
Placing = Callable[..., Place]


def _spec(placing: Placing, shape: tuple[int | None, ...], index: Callable[[Place], tuple]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *ids: index(placing(*ids)))


def head_spec(plan: Plan, placing: Placing, width: int) -> pl.BlockSpec:
    """A block of [B, N, T, width]."""
    return _spec(placing, (None, None, plan.block, width), lambda at: (at.row, at.head, at.queries, 0))


def statistic_spec(plan: Plan, placing: Placing) -> pl.BlockSpec:
    """A block of [B, N, 1, T]."""
    return _spec(placing, (None, None, 1, plan.block), lambda at: (at.row, at.head, 0, at.queries))


def own_spec(plan: Plan, placing: Placing, width: int) -> pl.BlockSpec:
    """A block of [B, K, T, width]."""
    return _spec(placing, (None, None, plan.block, width), lambda at: (at.row, at.kv_head, at.own, 0))


def prefix_spec(plan: Plan, placing: Placing, width: int) -> pl.BlockSpec:
    """A block of [K, P, width]."""
    return _spec(placing, (None, plan.prefix_block, width), lambda at: (at.kv_head, at.prefix, 0))


def bias_spec(plan: Plan, placing: Placing) -> pl.BlockSpec:
    """A block of [K, 1, P]."""
    return _spec(placing, (None, 1, plan.prefix_block), lambda at: (at.kv_head, 0, at.prefix))


def _tokens_specs(plan: Plan, placing: Placing, tokens: Tokens) -> Tokens:
    row = _spec(placing, (None, 1, plan.block), lambda at: (at.row, 0, at.queries))
    return Tokens(head_spec(plan, placing, tokens.queries.shape[-1]), row, _where(tokens.positions, row))


def _own_specs(plan: Plan, placing: Placing, own: Own) -> Own:
    row = _spec(placing, (None, 1, plan.block), lambda at: (at.row, 0, at.own))
    matrix = own_spec(plan, placing, own.keys.shape[-1])
    return Own(matrix, matrix, row, _where(own.positions, row))


def _prefix_specs(plan: Plan, placing: Placing, prefix: Prefix) -> Prefix:
    row = _spec(placing, (1, plan.prefix_block), lambda at: (0, at.prefix))
    matrix = prefix_spec(plan, placing, prefix.keys.shape[-1])
    return Prefix(matrix, matrix, bias_spec(plan, placing), _where(prefix.positions, row))


def _where(operand: Array | None, spec: pl.BlockSpec) -> pl.BlockSpec | None:
    """`spec`, or None for an operand that is absent."""
    return None if operand is None else spec


def _upstream_specs(plan: Plan, placing: Placing, upstream: Upstream) -> Upstream:
    row = statistic_spec(plan, placing)
    return Upstream(head_spec(plan, placing, upstream.gradient.shape[-1]), row, row)


_SPECS = {Tokens: _tokens_specs, Own: _own_specs, Prefix: _prefix_specs, Upstream: _upstream_specs}


def operand_specs(plan: Plan, placing: Placing, *operands: Tokens | Own | Prefix | Upstream | None) -> list[Any]:
    """The block specs of a kernel's operands; None for one that is absent."""
    return [operand if operand is None else _SPECS[type(operand)](plan, placing, operand) for operand in operands]


def visible_blocks(plan: Plan, segments: Array) -> Array:
    """The blocks of own keys that a block of queries may see.

    Excluded are later blocks, those that the window has passed, and those whose segment ids
    are in another range (so that packed conversations cost little more than the sum of
    their own squares). Tokens are masked within a block besides.

    Args:
      segments: [B, 1, T].

    Returns:
      [B * T/block * T/block] int32, 1 for a pair (queries, keys) that is computed.
    """
    by_block = segments.reshape(-1, plan.num_blocks, plan.block)
    low, high = by_block.min(axis=-1), by_block.max(axis=-1)
    visible = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    distance = jnp.arange(plan.num_blocks)[:, None] - jnp.arange(plan.num_blocks)
    visible &= distance >= 0
    if plan.window:
        # Positions ascend at least as fast as tokens; this is the pair's least distance in tokens.
        visible &= (distance - 1) * plan.block + 1 < plan.window
    return visible.astype(jnp.int32).reshape(-1)


def is_visible(plan: Plan, visible: Any, row: Array, queries: Array, own: Array) -> Array:
    """Looks up a pair of blocks in the result of `visible_blocks`."""
    return visible[(row * plan.num_blocks + queries) * plan.num_blocks + own] != 0


def pair(queries: Array, keys: Array, query_axis: int) -> Array:
    """Products of rows [q, H] and [k, H], float32: [q, k], or [k, q] with query axis 1."""
    left, right = (queries, keys) if query_axis == 0 else (keys, queries)
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def along(row: Any, axis: int) -> Array:
    """A row [1, n], shaped to broadcast along an axis of a block."""
    return row[...] if axis == 1 else row[...].reshape(-1, 1)


def own_scores(plan: Plan, tokens: Tokens, own: Own, queries_at: Array, own_at: Array, query_axis: int):
    """Masked scores of one block of own keys, and the slope of their cap."""
    scores, slope = capped(pair(tokens.queries[...], own.keys[...], query_axis), plan.softcap)
    key_axis = 1 - query_axis

    def number(block, axis):
        return block * plan.block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)

    seen = number(queries_at, query_axis) >= number(own_at, key_axis)
    seen &= along(tokens.segments, query_axis) == along(own.segments, key_axis)
    if plan.window:
        seen &= along(tokens.positions, query_axis) - along(own.positions, key_axis) < plan.window
    return jnp.where(seen, scores, MASKED), slope


def prefix_scores(plan: Plan, tokens: Tokens, prefix: Prefix, query_axis: int):
    """Scores of one block of the prefix with bias and mask, and the slope of their cap."""
    scores, slope = capped(pair(tokens.queries[...], prefix.keys[...], query_axis), plan.softcap)
    key_axis = 1 - query_axis
    scores = scores + along(prefix.bias, key_axis)
    if prefix.positions is not None:
        distance = along(tokens.positions, query_axis) - along(prefix.positions, key_axis)
        scores = jnp.where(distance < plan.window, scores, MASKED)
    return scores, slope


def params(*semantics: str) -> pltpu.CompilerParams:
    """Compiler parameters: per grid axis "parallel", or "arbitrary" where it is summed over."""
    return pltpu.CompilerParams(dimension_semantics=semantics)
