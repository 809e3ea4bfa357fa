"""The forward kernel: one online softmax over a shared prefix and a row's own tokens.

FlashAttention (arXiv 2205.14135) whose inner loop runs over the blocks of the prefix first
and then over those of the row, so that maximum, sum and output are those of the whole, and
nothing is left to be merged.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cartridges_jax.attention import tpu_blocks as blocks
from cartridges_jax.attention.scores import MASKED
from cartridges_jax.attention.tpu_blocks import LANES, Own, Place, Plan, Prefix, Tokens


def walk_keys(plan: Plan):
    """The grid (row, head, block of queries, block of prefix or own keys), and its placing."""

    def placing(row, head, queries, step, visible):
        del visible
        # A block that a step does not need has the index of the step before or after: it is
        # not fetched again.
        prefix = jnp.minimum(step, max(plan.num_prefix_blocks - 1, 0))
        own = jnp.clip(step - plan.num_prefix_blocks, 0, queries)
        return Place(row, head, jax.lax.div(head, plan.queries_per_kv), queries, own, prefix)

    return (plan.num_blocks, plan.num_prefix_blocks + plan.num_blocks), placing


def _kernel(plan, visible, tokens, own, prefix, out, maximum, total, so_far, highest, summed):
    row, queries_at, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    own_at = jnp.maximum(step - plan.num_prefix_blocks, 0)

    @pl.when(step == 0)
    def _start():
        so_far[...] = jnp.zeros_like(so_far)
        highest[...] = jnp.full_like(highest, MASKED)
        summed[...] = jnp.zeros_like(summed)

    def absorb(scores: Array, values: Array) -> None:
        before = highest[...]  # [block, LANES], equal along the lanes, as the sum is
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - _lanes(now, scores.shape[1]))
        fade = jnp.exp(before - now)
        highest[...] = now
        summed[...] = fade * summed[...] + weights.sum(axis=1, keepdims=True)
        added = jax.lax.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        so_far[...] = _lanes(fade, added.shape[1]) * so_far[...] + added

    if prefix is not None:

        @pl.when(step < plan.num_prefix_blocks)
        def _prefix():
            scores, _ = blocks.prefix_scores(plan, tokens, prefix, query_axis=0)
            absorb(scores, prefix.values[...])

    @pl.when((step >= plan.num_prefix_blocks) & blocks.is_visible(plan, visible, row, queries_at, own_at))
    def _own():
        scores, _ = blocks.own_scores(plan, tokens, own, queries_at, own_at, query_axis=0)
        absorb(scores, own.values[...])

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        out[...] = (so_far[...] / _lanes(summed[...], so_far.shape[1])).astype(out.dtype)
        maximum[...] = highest[...].T[:1]
        total[...] = summed[...].T[:1]


def _lanes(x: Array, width: int) -> Array:
    """[n, LANES] of equal lanes to [n, width]."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def forward(plan: Plan, tokens: Tokens, own: Own, prefix: Prefix | None) -> tuple[Array, Array, Array]:
    """Attention of all tokens.

    Returns:
      output [B, N, T, H] in the dtype of the queries; maximum and sum of exp(score - maximum)
      of each query's scores, [B, N, 1, T] float32.
    """
    B, N, T, H = tokens.queries.shape
    grid, placing = walk_keys(plan)
    statistic = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
    statistic_spec = blocks.statistic_spec(plan, placing)
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, *grid),
            in_specs=blocks.operand_specs(plan, placing, tokens, own, prefix),
            out_specs=[blocks.head_spec(plan, placing, H), statistic_spec, statistic_spec],
            scratch_shapes=[
                pltpu.VMEM((plan.block, H), jnp.float32),
                pltpu.VMEM((plan.block, LANES), jnp.float32),
                pltpu.VMEM((plan.block, LANES), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, N, T, H), tokens.queries.dtype), statistic, statistic],
        compiler_params=blocks.params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=plan.interpret,
        name="attention_forward",
    )(blocks.visible_blocks(plan, tokens.segments), tokens, own, prefix)
