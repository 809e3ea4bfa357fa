"""The backward kernels: gradients of queries, of own keys and values, of the prefix.

Every kernel recomputes a block's probabilities from the maximum of the whole softmax;
the sum has been divided out of the upstream gradient. So each part gets the gradient of
one softmax over both. The gradient of the prefix is summed over all rows, in float32,
inside its kernel: a block of slots stays in the chip's memory while all queries of its
head pass by, which in XLA's operations would write scores of [K, B*G*T, P] to memory,
twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cartridges_jax.attention import tpu_blocks as blocks
from cartridges_jax.attention.tpu_blocks import LANES, Own, Place, Plan, Prefix, Tokens, Upstream
from cartridges_jax.attention.tpu_forward import walk_keys


def _weights(scores: Array, upstream: Upstream, values: Array, query_axis: int) -> tuple[Array, Array]:
    """exp(score - maximum) of a block, and the gradient of its (capped, biased) scores."""
    weights = jnp.exp(scores - blocks.along(upstream.maximum, query_axis))
    grad_weights = blocks.pair(upstream.gradient[...], values, query_axis)
    return weights, weights * (grad_weights - blocks.along(upstream.delta, query_axis))


def _add_product(total, left: Array, right: Array) -> None:
    total[...] += jax.lax.dot(left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _group_and_block(plan: Plan, step: Array) -> tuple[Array, Array]:
    """The head of its group and the block of queries that a step of a grid axis over both computes.

    Not `divmod`, which looks at signs and so needs a TPU to be present.
    """
    return jax.lax.div(step, plan.num_blocks), jax.lax.rem(step, plan.num_blocks)


def _queries_kernel(plan, visible, tokens, own, prefix, upstream, grad_queries, summed):
    row, queries_at, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    own_at = jnp.maximum(step - plan.num_prefix_blocks, 0)

    @pl.when(step == 0)
    def _start():
        summed[...] = jnp.zeros_like(summed)

    def add(scores: Array, slope: Array | float, part: Own | Prefix) -> None:
        _, grad_scores = _weights(scores, upstream, part.values[...], query_axis=0)
        _add_product(summed, grad_scores * slope, part.keys[...])

    if prefix is not None:

        @pl.when(step < plan.num_prefix_blocks)
        def _prefix():
            add(*blocks.prefix_scores(plan, tokens, prefix, query_axis=0), prefix)

    @pl.when((step >= plan.num_prefix_blocks) & blocks.is_visible(plan, visible, row, queries_at, own_at))
    def _own():
        add(*blocks.own_scores(plan, tokens, own, queries_at, own_at, query_axis=0), own)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        grad_queries[...] = summed[...].astype(grad_queries.dtype)


def grad_queries(plan: Plan, tokens: Tokens, own: Own, prefix: Prefix | None, upstream: Upstream) -> Array:
    """The gradient of the scaled queries, [B, N, T, H] in their dtype."""
    B, N, _, H = tokens.queries.shape
    grid, placing = walk_keys(plan)
    return pl.pallas_call(
        functools.partial(_queries_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, *grid),
            in_specs=blocks.operand_specs(plan, placing, tokens, own, prefix, upstream),
            out_specs=blocks.head_spec(plan, placing, H),
            scratch_shapes=[pltpu.VMEM((plan.block, H), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(tokens.queries.shape, tokens.queries.dtype),
        compiler_params=blocks.params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=plan.interpret,
        name="attention_grad_queries",
    )(blocks.visible_blocks(plan, tokens.segments), tokens, own, prefix, upstream)


def _own_kernel(plan, visible, tokens, own, upstream, grad_keys, grad_values, keys_sum, values_sum):
    row, own_at, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    _, queries_at = _group_and_block(plan, step)

    @pl.when(step == 0)
    def _start():
        keys_sum[...] = jnp.zeros_like(keys_sum)
        values_sum[...] = jnp.zeros_like(values_sum)

    @pl.when(blocks.is_visible(plan, visible, row, queries_at, own_at))
    def _add():
        scores, slope = blocks.own_scores(plan, tokens, own, queries_at, own_at, query_axis=1)
        weights, grad_scores = _weights(scores, upstream, own.values[...], query_axis=1)
        _add_product(values_sum, weights, upstream.gradient[...])
        _add_product(keys_sum, grad_scores * slope, tokens.queries[...])

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        grad_keys[...] = keys_sum[...].astype(grad_keys.dtype)
        grad_values[...] = values_sum[...].astype(grad_values.dtype)


def grad_own(plan: Plan, tokens: Tokens, own: Own, upstream: Upstream) -> tuple[Array, Array]:
    """The gradients of own keys and values, [B, K, T, H] in their dtypes."""
    B, K, _, H = own.keys.shape

    def placing(row, kv_head, own_at, step, visible):
        del visible
        group, queries = _group_and_block(plan, step)
        return Place(
            row=row,
            head=kv_head * plan.queries_per_kv + group,
            kv_head=kv_head,
            # Queries before the keys see none of them: the first block that will be needed is named instead.
            queries=jnp.maximum(queries, own_at),
            own=own_at,
        )

    spec = blocks.own_spec(plan, placing, H)
    return pl.pallas_call(
        functools.partial(_own_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, plan.num_blocks, plan.queries_per_kv * plan.num_blocks),
            in_specs=blocks.operand_specs(plan, placing, tokens, own, upstream),
            out_specs=[spec, spec],
            scratch_shapes=[pltpu.VMEM((plan.block, H), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (own.keys, own.values)],
        compiler_params=blocks.params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=plan.interpret,
        name="attention_grad_own",
    )(blocks.visible_blocks(plan, tokens.segments), tokens, own, upstream)


def _prefix_kernel(plan, tokens, prefix, upstream, grad_keys, grad_values, grad_bias, bias_sum):
    row, step = pl.program_id(2), pl.program_id(3)

    @pl.when((row == 0) & (step == 0))
    def _start():
        grad_keys[...] = jnp.zeros_like(grad_keys)
        grad_values[...] = jnp.zeros_like(grad_values)
        bias_sum[...] = jnp.zeros_like(bias_sum)

    scores, slope = blocks.prefix_scores(plan, tokens, prefix, query_axis=1)
    weights, grad_scores = _weights(scores, upstream, prefix.values[...], query_axis=1)
    _add_product(grad_values, weights, upstream.gradient[...])
    _add_product(grad_keys, grad_scores * slope, tokens.queries[...])
    bias_sum[...] += grad_scores.sum(axis=1, keepdims=True)

    @pl.when((row == pl.num_programs(2) - 1) & (step == pl.num_programs(3) - 1))
    def _finish():
        grad_bias[...] = bias_sum[...].T[:1]


def grad_prefix(plan: Plan, tokens: Tokens, prefix: Prefix, upstream: Upstream) -> tuple[Array, Array, Array]:
    """The gradients of the prefix: keys, values [K, P, H], bias [K, 1, P], float32."""
    K, P, H = prefix.keys.shape

    def placing(kv_head, prefix_at, row, step):
        group, queries = _group_and_block(plan, step)
        return Place(row, kv_head * plan.queries_per_kv + group, kv_head, queries, prefix=prefix_at)

    spec = blocks.prefix_spec(plan, placing, H)
    matrix = jax.ShapeDtypeStruct((K, P, H), jnp.float32)
    return pl.pallas_call(
        functools.partial(_prefix_kernel, plan),
        grid=(K, plan.num_prefix_blocks, tokens.queries.shape[0], plan.queries_per_kv * plan.num_blocks),
        in_specs=blocks.operand_specs(plan, placing, tokens, prefix, upstream),
        out_specs=[spec, spec, blocks.bias_spec(plan, placing)],
        scratch_shapes=[pltpu.VMEM((plan.prefix_block, LANES), jnp.float32)],
        out_shape=[matrix, matrix, jax.ShapeDtypeStruct((K, 1, P), jnp.float32)],
        compiler_params=blocks.params("parallel", "parallel", "arbitrary", "arbitrary"),
        interpret=plan.interpret,
        name="attention_grad_prefix",
    )(tokens, prefix, upstream)
