"""Context distillation on stored top-k targets (paper section 4.2).

For every target token the student's distribution q is drawn to the teacher's p. Only
the teacher's k most likely tokens are stored, so both are compared on k + 1 classes:
those tokens, and everything else (`tail="class"`, the default: a proper KL on the
coarsened distributions). `tail="drop"` is the paper's plain form: the sum runs over the
k stored tokens alone.

The student's logits [M, V] are never held: the vocabulary is read in blocks. The loss of
a row depends on k + 1 numbers, the chosen logits and the log-sum-exp of the rest, so a
running maximum and sum suffice, and the gradient of that log-sum-exp is a weighted mean
of the head's rows that is carried along and rescaled as the maximum moves (as in online
softmax, arXiv 1805.02867, and FlashAttention, arXiv 2205.14135). Forward and gradient
together cost the two products that they cost with all logits in memory.

On a mesh that splits the vocabulary, each part is read on its own devices, and the sums are
joined once at the end: no part of the head is sent over the tensor axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cartridges_jax.parallel import constrain, num_parts
from cartridges_jax.quantized import Matrix, linear_rows, mix_rows, rows

TAILS = ("class", "drop")

# A teacher's remaining probability below this is rounding of the stored values.
_ROUNDING = 1e-6
# Excludes a logit from a sum of exponentials; finite, so that its gradient stays finite.
_EXCLUDED = -1e30
# Logits held at a time: 4 MiB in float32 (blocks that fit a cache are measurably faster on CPUs),
# but enough tokens to keep a product busy.
_BLOCK_LOGITS = 2**20
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1024, 8192


def divergence_per_token(
    hidden: Array,
    head: Matrix,
    ids: Array,
    logprobs: Array,
    tail: str = "class",
    *,
    softcap: float = 0.0,
    block: int | None = None,
) -> Array:
    """KL(teacher || student) of every target row, in nats.

    All k entries count, however little mass they carry together: rows of high entropy
    are where the knowledge is. The gradient goes to `hidden` alone: the teacher and the
    head are frozen.

    Args:
      hidden: [M, D], the student's, as returned by `Decoder`.
      head: [V, D], the model's output embedding.
      ids: [M, k] int32, the teacher's most likely tokens, distinct within a row.
      logprobs: [M, k] float32, their log-probabilities; -inf marks an unused entry.
      tail: "class" or "drop".
      softcap: c bounds the logits as c * tanh(logit / c); 0 is off.
      block: tokens of the vocabulary at a time, of each part; None chooses (`block_size`).

    Returns:
      [M] float32.

    Raises:
      ValueError: unknown `tail`, or differentiated with respect to the head.
    """
    if tail not in TAILS:
        raise ValueError(f"tail {tail!r} is not one of {TAILS}")
    num_rows, vocab_size = hidden.shape[0], head.shape[0]
    parts = num_parts("vocab", vocab_size)
    if block is None:
        block = block_size(vocab_size // parts, num_rows // num_parts("rows", num_rows))
    return _divergence((tail, softcap, min(block, vocab_size // parts), parts), hidden, head, ids, logprobs)


def block_size(vocab_size: int, num_rows: int) -> int:
    """Tokens of the vocabulary at a time: equal blocks, the last at most a little smaller."""
    limit = min(max(_BLOCK_LOGITS // max(num_rows, 1), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    num_blocks = -(-vocab_size // limit)
    even = -(-vocab_size // num_blocks)
    return min(-(-even // 128) * 128, vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(static: tuple[str, float, int, int], hidden: Array, head: Any, ids: Array, logprobs: Array) -> Array:
    tail, softcap, block, parts = static
    chosen, rest, _ = _stream(hidden, head, ids, logprobs, softcap, block, parts, gradient=False)
    return _coarsened(chosen, rest, logprobs, tail)


def _forward(static, hidden, head, ids, logprobs):
    tail, softcap, block, parts = static
    if any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=_is_primal)):
        raise ValueError("the distillation loss has no gradient with respect to the LM head, which is frozen")
    hidden, ids, logprobs = hidden.value, ids.value, logprobs.value
    head = jax.tree.map(lambda leaf: leaf.value, head, is_leaf=_is_primal)
    chosen, rest, mean_row = _stream(hidden, head, ids, logprobs, softcap, block, parts, gradient=True)
    divergence, pull = jax.vjp(lambda chosen, rest: _coarsened(chosen, rest, logprobs, tail), chosen, rest)
    grad_chosen, grad_rest = pull(jnp.ones_like(divergence))
    grad_chosen = grad_chosen * _slope(chosen, softcap)

    grad_hidden = _add_chosen(grad_rest[:, None] * mean_row, head, ids, grad_chosen, parts)
    # The zero-sized array carries the dtype that the gradient must have.
    return divergence, (grad_hidden, jnp.zeros((0,), hidden.dtype))


def _backward(static, saved, upstream):
    grad_hidden, like = saved
    return (upstream[:, None] * grad_hidden).astype(like.dtype), None, None, None


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


_divergence.defvjp(_forward, _backward, symbolic_zeros=True)


def _each_part(function: Callable[[Any, Array | int], Any], head: Any, parts: int) -> Any:
    """Results of function(part of the head, its first token) for every part of the vocabulary, stacked."""
    size = head.shape[0] // parts
    split = jax.tree.map(lambda leaf: leaf.reshape(parts, size, *leaf.shape[1:]), head)
    return jax.vmap(function, spmd_axis_name="tensor")(split, jnp.arange(parts) * size)


def _add_chosen(total: Array, head: Any, ids: Array, weights: Array, parts: int) -> Array:
    """Adds to total [M, D] the head's rows at ids [M, k], weighted by [M, k]; float32."""

    def add_part(part: Any, first: Array | int, total: Array) -> Array:
        def add(total, entry):
            # One stored token of every row at a time: [M, k, D] may be large.
            entry_ids, weight = entry
            at = entry_ids - first
            here = (at >= 0) & (at < part.shape[0])
            row = rows(part, jnp.clip(at, 0, part.shape[0] - 1)).astype(jnp.float32)
            return total + jnp.where(here, weight, 0)[:, None] * row, None

        return jax.lax.scan(add, total, (ids.T, weights.T))[0]

    ids, weights = constrain(ids, "lookups", None), constrain(weights, "lookups", None)
    total = constrain(total, "lookups", "lookup_width")
    if parts == 1:
        total = add_part(head, 0, total)
    else:
        total += _each_part(lambda part, first: add_part(part, first, jnp.zeros_like(total)), head, parts).sum(axis=0)
    return constrain(total, "rows", None)


def _stream(
    hidden: Array, head: Any, ids: Array, logprobs: Array, softcap: float, block: int, parts: int, *, gradient: bool
) -> tuple[Array, Array, Array | None]:
    """The numbers of the logits that the loss depends on.

    Returns:
      chosen [M, k] float32, the stored tokens' logits (0 for unused entries); rest [M]
      float32, the log-sum-exp of all others; and with `gradient` mean_row [M, D] float32,
      the gradient of `rest` with respect to `hidden`.
    """
    read = functools.partial(_stream_part, hidden, ids, logprobs, softcap, block, gradient)
    if parts == 1:
        maximum, total, chosen, weighted_rows = read(head, 0)
    else:
        maximum, total, chosen, weighted_rows = _each_part(read, head, parts)
        # Joins the parts' sums, each relative to its own maximum.
        shrink = jnp.exp(maximum - maximum.max(axis=0))
        maximum, total, chosen = maximum.max(axis=0), (total * shrink).sum(axis=0), chosen.sum(axis=0)
        weighted_rows = (weighted_rows * shrink[..., None]).sum(axis=0) if gradient else None
    mean_row = None if weighted_rows is None else weighted_rows / total[:, None]
    return chosen, maximum + jnp.log(total), mean_row


def _stream_part(
    hidden: Array,
    ids: Array,
    logprobs: Array,
    softcap: float,
    block: int,
    gradient: bool,
    head: Any,
    first: Array | int,
) -> tuple[Array, Array, Array, Array | None]:
    """Reads one part of the vocabulary, whose first token is `first`.

    Returns:
      maximum [M] of the logits that are not stored; total [M] and weighted_rows [M, D], the sums of
      their exponentials relative to it, plain and weighting the head's rows; chosen [M, k],
      0 for tokens of other parts.
    """
    num_rows, vocab_size = hidden.shape[0], head.shape[0]
    stored = jnp.isfinite(logprobs)
    row = jnp.arange(num_rows)[:, None]

    def take(carry, start, size):
        maximum, total, chosen, weighted_rows = carry
        part = jax.tree.map(lambda leaf: constrain(jax.lax.dynamic_slice_in_dim(leaf, start, size)), head)
        logits = _capped(linear_rows(hidden, part), softcap)
        at = ids - first - start
        here = stored & (at >= 0) & (at < size)
        chosen = jnp.where(here, jnp.take_along_axis(logits, jnp.clip(at, 0, size - 1), axis=-1), chosen)
        # The rest is summed over its own logits: one minus the sum of the k would lose its
        # value, and its gradient, where the student is sure of the k.
        others = logits.at[row, jnp.where(here, at, size)].set(_EXCLUDED, mode="drop")
        higher = jnp.maximum(maximum, others.max(axis=-1))
        shrink = jnp.exp(maximum - higher)
        weights = jnp.exp(others - higher[:, None])
        total = total * shrink + weights.sum(axis=-1)
        if gradient:
            weighted_rows = weighted_rows * shrink[:, None] + mix_rows(
                (weights * _slope(logits, softcap)).astype(hidden.dtype), part
            )
        return higher, total, chosen, weighted_rows

    carry = (
        jnp.full(num_rows, _EXCLUDED, jnp.float32),
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(ids.shape, jnp.float32),
        jnp.zeros(hidden.shape, jnp.float32) if gradient else None,
    )
    whole = vocab_size // block
    carry, _ = jax.lax.scan(lambda carry, start: (take(carry, start, block), None), carry, jnp.arange(whole) * block)
    if vocab_size % block:
        carry = take(carry, whole * block, vocab_size % block)
    return carry


def _capped(logits: Array, softcap: float) -> Array:
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _slope(capped: Array, softcap: float) -> Array | float:
    """The derivative of the cap, from the capped logits."""
    return 1.0 - (capped / softcap) ** 2 if softcap else 1.0


def _coarsened(chosen: Array, rest: Array, logprobs: Array, tail: str) -> Array:
    """The divergence from the student's chosen logits [M, k] and the log-sum-exp [M] of the rest."""
    stored = jnp.isfinite(logprobs)
    teacher = jnp.where(stored, logprobs, 0.0)
    probability = jnp.where(stored, jnp.exp(teacher), 0.0)
    normaliser = jnp.logaddexp(rest, jax.nn.logsumexp(jnp.where(stored, chosen, _EXCLUDED), axis=-1))
    divergence = jnp.sum(probability * (teacher - (chosen - normaliser[:, None])), axis=-1)
    if tail == "class":
        remaining = 1.0 - jnp.sum(probability, axis=-1)
        remaining = jnp.where(remaining > _ROUNDING, remaining, 0.0)
        log_remaining = jnp.log(jnp.where(remaining > 0, remaining, 1.0))
        divergence += jnp.where(remaining > 0, remaining * (log_remaining - (rest - normaliser)), 0.0)
    return divergence
