"""Attention in plain XLA operations: one softmax over two parts of keys.

The prefix part (no batch axis, mostly no mask) and the conversation's own part are scored
separately and normalised together, so the prefix is neither copied per row nor
concatenated per layer. The gradient is written out over both parts with the maximum,
the sum and the output of the whole (as in FlashAttention, arXiv 2205.14135): the
probabilities are recomputed instead of stored, which takes about the same time on a CPU
and half of the memory. A merge of two finished attentions by their log-sum-exp would lose
the gradient through it (guarded by
tests/test_rope_and_attention.py::test_gradients_equal_those_of_one_dense_softmax).

Heads are grouped as [B, K, G*T, H] before the products: XLA's CPU backend turns
batched products with interleaved batch axes into slow loops.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cartridges_jax.attention.scores import MASKED, capped
from cartridges_jax.attention.types import Array, LayerPrefix


def attend_masked(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    prefix: LayerPrefix | None,
    prefix_mask: Array | None,
    softcap: float,
) -> Array:
    """`attention.attend` of scaled queries, with masks [B, T, S] and [B, T, P]."""
    B, T, N, H = queries.shape
    K = keys.shape[1]
    G = N // K
    q = queries.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    out = _softmax(softcap, q, keys, values, mask, prefix, prefix_mask)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(softcap, q, keys, values, mask, prefix, prefix_mask):
    """Attention of scaled, grouped queries [B, K, G*T, H]; returns the same shape."""
    return _forward(softcap, q, keys, values, mask, prefix, prefix_mask)[0]


def _forward(softcap, q, keys, values, mask, prefix, prefix_mask):
    B, K, M, H = q.shape
    own, _ = _own_scores(softcap, q, keys, mask)
    maximum = own.max(axis=-1)  # [B, K, G*T]
    if prefix is not None:
        slots, _ = _prefix_scores(softcap, q, prefix, prefix_mask)
        maximum = jnp.maximum(maximum, _by_row(slots.max(axis=-1), B))

    own = jnp.exp(own - maximum[..., None])
    total = own.sum(axis=-1)
    attention_output = jnp.einsum("bkms,bksh->bkmh", own.astype(q.dtype), values, preferred_element_type=jnp.float32)
    if prefix is not None:
        slots = jnp.exp(slots - _by_head(maximum)[..., None])
        total = total + _by_row(slots.sum(axis=-1), B)
        of_prefix = jnp.einsum("kmp,kph->kmh", slots.astype(q.dtype), prefix.values, preferred_element_type=jnp.float32)
        attention_output = attention_output + _by_row(of_prefix, B)
    out = (attention_output / total[..., None]).astype(q.dtype)
    return out, (q, keys, values, mask, prefix, prefix_mask, out, maximum, total)


def _backward(softcap, saved, upstream):
    q, keys, values, mask, prefix, prefix_mask, out, maximum, total = saved
    dtype, wide = q.dtype, {"preferred_element_type": jnp.float32}
    # Maximum and sum are saved separately: their log-sum-exp would round large scores. Dividing
    # the upstream gradient by the sum leaves exp(score - maximum) for the probability.
    upstream = upstream.astype(jnp.float32) / total[..., None]
    delta = jnp.sum(upstream * out.astype(jnp.float32), axis=-1)  # [B, K, G*T]
    upstream = upstream.astype(dtype)

    own, slope = _own_scores(softcap, q, keys, mask)
    own = jnp.exp(own - maximum[..., None])
    grad_values = jnp.einsum("bkms,bkmh->bksh", own.astype(dtype), upstream, **wide)
    grad_scores = own * (jnp.einsum("bkmh,bksh->bkms", upstream, values, **wide) - delta[..., None]) * slope
    grad_scores = grad_scores.astype(dtype)
    grad_queries = jnp.einsum("bkms,bksh->bkmh", grad_scores, keys, **wide)
    grad_keys = jnp.einsum("bkms,bkmh->bksh", grad_scores, q, **wide)

    grad_prefix = None
    if prefix is not None:
        slots, slope = _prefix_scores(softcap, q, prefix, prefix_mask)
        slots = jnp.exp(slots - _by_head(maximum)[..., None])
        upstream, by_head = _by_head(upstream), _by_head(q)
        grad_prefix_values = jnp.einsum("kmp,kmh->kph", slots.astype(dtype), upstream, **wide)
        grad_scores = jnp.einsum("kmh,kph->kmp", upstream, prefix.values, **wide)
        grad_scores = slots * (grad_scores - _by_head(delta)[..., None])
        grad_bias = None if prefix.bias is None else grad_scores.sum(axis=1).astype(prefix.bias.dtype)
        grad_scores = (grad_scores * slope).astype(dtype)
        grad_queries = grad_queries + _by_row(jnp.einsum("kmp,kph->kmh", grad_scores, prefix.keys, **wide), q.shape[0])
        grad_prefix_keys = jnp.einsum("kmp,kmh->kph", grad_scores, by_head, **wide)
        grad_prefix = LayerPrefix(
            grad_prefix_keys.astype(prefix.keys.dtype), grad_prefix_values.astype(prefix.values.dtype), grad_bias
        )
    return (
        grad_queries.astype(dtype), grad_keys.astype(keys.dtype), grad_values.astype(values.dtype), None, grad_prefix, None
    )  # fmt: skip


_softmax.defvjp(_forward, _backward)


def _own_scores(softcap: float, q: Array, keys: Array, mask: Array) -> tuple[Array, Array | float]:
    """Masked scores [B, K, G*T, S] float32, and the slope of their cap."""
    B, K, M, _ = q.shape
    scores = jnp.einsum("bkmh,bksh->bkms", q, keys, preferred_element_type=jnp.float32)
    scores, slope = capped(scores, softcap)
    by_group = scores.reshape(B, K, M // mask.shape[1], *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_group, MASKED).reshape(scores.shape), slope


def _prefix_scores(
    softcap: float, q: Array, prefix: LayerPrefix, prefix_mask: Array | None
) -> tuple[Array, Array | float]:
    """Scores [K, B*G*T, P] float32 with bias and mask, and the slope of their cap.

    The prefix is read once for all rows.
    """
    scores = jnp.einsum("kmh,kph->kmp", _by_head(q), prefix.keys, preferred_element_type=jnp.float32)
    scores, slope = capped(scores, softcap)
    if prefix.bias is not None:
        scores = scores + prefix.bias[:, None]
    if prefix_mask is not None:
        B, T, P = prefix_mask.shape
        seen = jnp.broadcast_to(prefix_mask[:, None], (B, q.shape[2] // T, T, P)).reshape(-1, P)
        scores = jnp.where(seen, scores, MASKED)
    return scores, slope


def _by_head(x: Array) -> Array:
    """[B, K, M, …] to [K, B*M, …]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _by_row(x: Array, num_rows: int) -> Array:
    """[K, B*M, …] back to [B, K, M, …]."""
    return x.reshape(x.shape[0], num_rows, -1, *x.shape[2:]).swapaxes(0, 1)
