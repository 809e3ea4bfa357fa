"""Attention of packed rows over a shared prefix, in Pallas kernels for TPUs.

One softmax over both parts, as in `attention.xla`: the forward kernel runs over the prefix
and then over the row's own tokens, and one `custom_vjp` around it gives every part the
maximum, sum and output of the whole. Scores never leave the chip.

Why not splash attention (`jax.experimental.pallas.ops.tpu`) for the own part, and a merge:
its log-sum-exp carries no gradient, and the backward kernels that could be given the global
one are private functions of an experimental module. It takes neither a bias per key nor a
prefix that belongs to several segments, so kernels for the prefix would be needed all the
same. These need `pallas_call` alone, write no partial outputs that are then merged, and skip
the blocks that packing leaves empty.

Reads over a cache stay with XLA: a decode step's product with the prefix reads each slot
once for all rows, and the compiler keeps its scores on the chip (on a v5e those of 256 rows
over 2,048 slots, with Llama-3.1-8B's heads); a prefill is read in chunks that bound them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from cartridges_jax.attention import tpu_backward, tpu_forward
from cartridges_jax.attention.scores import MASKED
from cartridges_jax.attention.sharding import Layout, layout_in_context
from cartridges_jax.attention.tpu_blocks import LANES, Own, Plan, Prefix, Tokens, Upstream
from cartridges_jax.attention.types import LayerPrefix, PackedRows

# The most tokens or slots of a block. A block of keys is then read for 512 queries, 512
# operations a byte, about what v5e (240), v5p (166) and v6e (560) need to be bound by their
# arithmetic; larger blocks waste more on the diagonal of the causal part.
MAX_BLOCK = 512


def supports(head_dim: int) -> bool:
    """True if heads of this width fill whole vector registers, or halves of them."""
    return head_dim % (LANES // 2) == 0


def attend_packed(
    queries: Array,
    keys: Array,
    values: Array,
    rows: PackedRows,
    prefix: LayerPrefix | None,
    *,
    softcap: float,
    interpret: bool = False,
    max_block: int = MAX_BLOCK,
) -> Array:
    """`attention.attend` of scaled queries over packed rows.

    Args:
      queries: [B, T, N, H], H one that `supports` takes.
      keys, values: [B, K, T, H].
      interpret: run by Pallas' interpreter, on any backend.
      max_block: a multiple of 128.

    Returns:
      [B, T, N, H]. Rows and heads are computed where a mesh in context puts them
      (`attention.sharding`).
    """
    B, T, N, H = queries.shape
    block, num_blocks = _even_blocks(T, max_block)
    prefix_block, num_prefix_blocks = (0, 0) if prefix is None else _even_blocks(prefix.keys.shape[1], max_block)
    plan = Plan(
        block=block,
        num_blocks=num_blocks,
        prefix_block=prefix_block,
        num_prefix_blocks=num_prefix_blocks,
        queries_per_kv=N // keys.shape[1],
        window=rows.window,
        softcap=softcap,
        interpret=interpret,
    )

    def whole_blocks(x: Array, axis: int) -> Array:
        return _padded(x, axis, block * num_blocks)

    segments = whole_blocks(rows.segment_ids[:, None], 2)
    positions = whole_blocks(rows.positions[:, None], 2) if rows.window else None
    tokens = Tokens(whole_blocks(queries.transpose(0, 2, 1, 3), 2), segments, positions)
    own = Own(whole_blocks(keys, 2), whole_blocks(values, 2), segments, positions)
    passed = rows.prefix_positions if rows.window else None
    slots = None if prefix is None else _prefix(prefix, passed, prefix_block * num_prefix_blocks)
    return _softmax(plan, layout_in_context(B, keys.shape[1]), tokens, own, slots)[:, :, :T].transpose(0, 2, 1, 3)


def _even_blocks(size: int, max_block: int) -> tuple[int, int]:
    """(size, number) of blocks of whole lanes: the fewest that `max_block` allows, then the smallest."""
    number = -(-size // max_block)
    return LANES * -(-size // (number * LANES)), number


def _padded(x: Array, axis: int, size: int, value: float = 0) -> Array:
    """`x` padded at the end of an axis; padding tokens attend to each other."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _prefix(prefix: LayerPrefix, positions: Array | None, num_slots: int) -> Prefix:
    K, P, _ = prefix.keys.shape
    bias = jnp.zeros((K, P), jnp.float32) if prefix.bias is None else prefix.bias.astype(jnp.float32)
    return Prefix(
        _padded(prefix.keys, 1, num_slots),
        _padded(prefix.values, 1, num_slots),
        _padded(bias, 1, num_slots, MASKED)[:, None],
        None if positions is None else _padded(positions[None], 1, num_slots),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(plan: Plan, layout: Layout, tokens: Tokens, own: Own, prefix: Prefix | None) -> Array:
    return _forward(plan, layout, tokens, own, prefix)[0]


def _forward(plan, layout, tokens, own, prefix):
    specs = _operand_specs(layout, prefix)
    kernel = functools.partial(tpu_forward.forward, plan)
    out, maximum, total = layout.spread(kernel, specs, (layout.by_row_and_head,) * 3)(tokens, own, prefix)
    return out, (tokens, own, prefix, out, maximum, total)


def _backward(plan, layout, saved, gradient):
    tokens, own, prefix, out, maximum, total = saved
    # As in `attention.xla`: with the sum divided out, exp(score - maximum) is the probability.
    gradient = gradient.astype(jnp.float32) / total.swapaxes(2, 3)
    delta = jnp.sum(gradient * out.astype(jnp.float32), axis=-1)[:, :, None]
    upstream = Upstream(gradient.astype(out.dtype), maximum, delta)

    def kernels(tokens, own, prefix, upstream):
        grad_tokens = tpu_backward.grad_queries(plan, tokens, own, prefix, upstream)
        grad_own = tpu_backward.grad_own(plan, tokens, own, upstream)
        if prefix is None:
            return grad_tokens, grad_own, None
        grad_prefix = tpu_backward.grad_prefix(plan, tokens, prefix, upstream)
        return grad_tokens, grad_own, jax.tree.map(layout.sum_over_rows, grad_prefix)

    by_row_and_head = layout.by_row_and_head
    grad_queries, grad_own, grad_prefix = layout.spread(
        kernels,
        (*_operand_specs(layout, prefix), by_row_and_head),
        (by_row_and_head, by_row_and_head, layout.by_head),
    )(tokens, own, prefix, upstream)
    if prefix is not None:
        keys, values, bias = grad_prefix
        grad_prefix = Prefix(keys.astype(prefix.keys.dtype), values.astype(prefix.values.dtype), bias, None)
    return Tokens(grad_queries, None, None), Own(*grad_own, None, None), grad_prefix


def _operand_specs(layout: Layout, prefix: Prefix | None) -> tuple[Tokens, Own, Prefix | None]:
    row, row_and_head, head = layout.by_row, layout.by_row_and_head, layout.by_head
    return (
        Tokens(row_and_head, row, row),
        Own(row_and_head, row_and_head, row, row),
        None if prefix is None else Prefix(head, head, head, PartitionSpec()),
    )


_softmax.defvjp(_forward, _backward)
