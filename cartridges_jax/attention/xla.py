"""Attention in plain XLA operations: one softmax over two parts of keys.

The prefix part (no batch axis, no mask) and the conversation's own part are scored
apart and normalised together, so the prefix is neither copied per row nor
concatenated per layer. The gradient is written out over both parts with the maximum,
the sum and the output of the whole (as in FlashAttention, arXiv 2205.14135): the
probabilities are computed again instead of being kept, which takes about the same time
on a CPU and half of the memory. A merge of two finished attentions by their log-sum-exp would lose
the gradient through it (guarded by
tests/test_rope_and_attention.py::test_gradients_equal_those_of_one_dense_softmax).

Heads are grouped as [B, K, G*T, H] before the products: XLA's CPU backend turns
batched products with interleaved batch axes into slow loops.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a masked score minus the maximum never becomes inf - inf.
_MASKED = -1e30


class LayerPrefix(NamedTuple):
    """One layer of a KV prefix: keys, values [K, P, H]; bias [K, P] or None."""

    keys: Array
    values: Array
    bias: Array | None = None


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    prefix: LayerPrefix | None = None,
    *,
    prefix_mask: Array | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Array:
    """Softmax attention of T queries over P prefix slots and S own slots.

    Scores are normalised in float32.

    Args:
      queries: [B, T, N, H].
      keys: [B, K, S, H]; query head n reads key head n // (N / K).
      values: [B, K, S, H].
      mask: [B, T, S] bool, True where an own slot is seen; each query sees one.
      prefix: the layer's prefix, shared by the rows.
      prefix_mask: [B, T, P] bool, True where a prefix slot is seen; None is everywhere.
      scale: of the scores; H**-0.5 by default.
      softcap: c bounds the scores as c * tanh(score / c), before bias and masks (Gemma
        2, arXiv 2408.00118); 0 is off.

    Returns:
      [B, T, N, H] in the dtype of `queries`.
    """
    B, T, N, H = queries.shape
    K = keys.shape[1]
    G = N // K
    q = (queries * (H**-0.5 if scale is None else scale)).astype(queries.dtype)
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    out = _softmax(softcap, q, keys, values, mask, prefix, prefix_mask)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(softcap, q, keys, values, mask, prefix, prefix_mask):
    """Attention of scaled, grouped queries [B, K, G*T, H]; the same shape comes out."""
    return _forward(softcap, q, keys, values, mask, prefix, prefix_mask)[0]


def _forward(softcap, q, keys, values, mask, prefix, prefix_mask):
    B, K, M, H = q.shape
    own, _ = _own_scores(softcap, q, keys, mask)
    maximum = own.max(axis=-1)  # [B, K, G*T]
    if prefix is not None:
        front, _ = _front_scores(softcap, q, prefix, prefix_mask)
        maximum = jnp.maximum(maximum, _by_row(front.max(axis=-1), B))

    own = jnp.exp(own - maximum[..., None])
    total = own.sum(axis=-1)
    mixed = jnp.einsum("bkms,bksh->bkmh", own.astype(q.dtype), values, preferred_element_type=jnp.float32)
    if prefix is not None:
        front = jnp.exp(front - _by_head(maximum)[..., None])
        total = total + _by_row(front.sum(axis=-1), B)
        front_mixed = jnp.einsum(
            "kmp,kph->kmh", front.astype(q.dtype), prefix.values, preferred_element_type=jnp.float32
        )
        mixed = mixed + _by_row(front_mixed, B)
    out = (mixed / total[..., None]).astype(q.dtype)
    return out, (q, keys, values, mask, prefix, prefix_mask, out, maximum, total)


def _backward(softcap, saved, upstream):
    q, keys, values, mask, prefix, prefix_mask, out, maximum, total = saved
    dtype, wide = q.dtype, {"preferred_element_type": jnp.float32}
    # Maximum and sum are kept apart: their log-sum-exp would round large scores. Dividing
    # the upstream gradient by the sum leaves exp(score - maximum) for the probability.
    upstream = upstream.astype(jnp.float32) / total[..., None]
    through = jnp.sum(upstream * out.astype(jnp.float32), axis=-1)  # [B, K, G*T]
    upstream = upstream.astype(dtype)

    own, slope = _own_scores(softcap, q, keys, mask)
    own = jnp.exp(own - maximum[..., None])
    to_values = jnp.einsum("bkms,bkmh->bksh", own.astype(dtype), upstream, **wide)
    to_scores = own * (jnp.einsum("bkmh,bksh->bkms", upstream, values, **wide) - through[..., None]) * slope
    to_scores = to_scores.astype(dtype)
    to_queries = jnp.einsum("bkms,bksh->bkmh", to_scores, keys, **wide)
    to_keys = jnp.einsum("bkms,bkmh->bksh", to_scores, q, **wide)

    to_prefix = None
    if prefix is not None:
        front, slope = _front_scores(softcap, q, prefix, prefix_mask)
        front = jnp.exp(front - _by_head(maximum)[..., None])
        upstream, by_head = _by_head(upstream), _by_head(q)
        to_front_values = jnp.einsum("kmp,kmh->kph", front.astype(dtype), upstream, **wide)
        to_scores = jnp.einsum("kmh,kph->kmp", upstream, prefix.values, **wide)
        to_scores = front * (to_scores - _by_head(through)[..., None])
        to_bias = None if prefix.bias is None else to_scores.sum(axis=1).astype(prefix.bias.dtype)
        to_scores = (to_scores * slope).astype(dtype)
        to_queries = to_queries + _by_row(jnp.einsum("kmp,kph->kmh", to_scores, prefix.keys, **wide), q.shape[0])
        to_front_keys = jnp.einsum("kmp,kmh->kph", to_scores, by_head, **wide)
        to_prefix = LayerPrefix(
            to_front_keys.astype(prefix.keys.dtype), to_front_values.astype(prefix.values.dtype), to_bias
        )
    return (
        to_queries.astype(dtype), to_keys.astype(keys.dtype), to_values.astype(values.dtype), None, to_prefix, None
    )  # fmt: skip


_softmax.defvjp(_forward, _backward)


def _own_scores(softcap: float, q: Array, keys: Array, mask: Array) -> tuple[Array, Array | float]:
    """Masked scores [B, K, G*T, S] float32, and the slope of their cap."""
    B, K, M, _ = q.shape
    scores = jnp.einsum("bkmh,bksh->bkms", q, keys, preferred_element_type=jnp.float32)
    scores, slope = _capped(scores, softcap)
    by_group = scores.reshape(B, K, M // mask.shape[1], *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_group, _MASKED).reshape(scores.shape), slope


def _front_scores(softcap: float, q: Array, prefix: LayerPrefix, prefix_mask: Array | None) -> tuple[Array, Array | float]:
    """Scores [K, B*G*T, P] float32 with bias and mask, and the slope of their cap.

    The prefix is read once for all rows.
    """
    scores = jnp.einsum("kmh,kph->kmp", _by_head(q), prefix.keys, preferred_element_type=jnp.float32)
    scores, slope = _capped(scores, softcap)
    if prefix.bias is not None:
        scores = scores + prefix.bias[:, None]
    if prefix_mask is not None:
        B, T, P = prefix_mask.shape
        seen = jnp.broadcast_to(prefix_mask[:, None], (B, q.shape[2] // T, T, P)).reshape(-1, P)
        scores = jnp.where(seen, scores, _MASKED)
    return scores, slope


def _capped(scores: Array, softcap: float) -> tuple[Array, Array | float]:
    if not softcap:
        return scores, 1.0
    bounded = jnp.tanh(scores / softcap)
    return softcap * bounded, 1.0 - bounded**2


def _by_head(x: Array) -> Array:
    """[B, K, M, …] to [K, B*M, …]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _by_row(x: Array, num_rows: int) -> Array:
    """[K, B*M, …] back to [B, K, M, …]."""
    return x.reshape(x.shape[0], num_rows, -1, *x.shape[2:]).swapaxes(0, 1)
