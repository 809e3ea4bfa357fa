"""Attention in plain XLA operations: one softmax over two parts of keys.

The prefix part (no batch axis, no mask) and the conversation's own part are scored
apart and normalised together, so the prefix is neither copied per row nor
concatenated per layer. The maximum and the sum are taken over both parts, which
keeps automatic differentiation exact; a merge of two finished attentions by their
log-sum-exp would lose the gradient through it (guarded by
tests/test_rope_and_attention.py::test_gradients_equal_those_of_one_dense_softmax).

Heads are grouped as [B, K, G*T, H] before the products: XLA's CPU backend turns
batched products with interleaved batch axes into slow loops.
"""
from __future__ import annotations

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
    dtype = queries.dtype
    scaled = (queries * (H**-0.5 if scale is None else scale)).astype(dtype)
    q = scaled.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]

    own = jnp.einsum(
        "bkmh,bksh->bkms", q.reshape(B, K, G * T, H), keys, preferred_element_type=jnp.float32
    )
    own = jnp.where(mask[:, None, None], _capped(own, softcap).reshape(B, K, G, T, -1), _MASKED)
    maximum = own.max(axis=-1)  # [B, K, G, T]

    if prefix is not None:
        # [K, B*G*T, H] x [K, P, H]: the prefix is read once for all rows.
        front = jnp.einsum(
            "kmh,kph->kmp",
            q.transpose(1, 0, 2, 3, 4).reshape(K, B * G * T, H),
            prefix.keys,
            preferred_element_type=jnp.float32,
        )
        front = _capped(front, softcap)
        if prefix.bias is not None:
            front = front + prefix.bias[:, None]
        if prefix_mask is not None:
            seen = jnp.broadcast_to(prefix_mask[:, None], (B, G, T, front.shape[-1])).reshape(B * G * T, -1)
            front = jnp.where(seen, front, _MASKED)
        front_maximum = front.max(axis=-1).reshape(K, B, G, T).transpose(1, 0, 2, 3)
        maximum = jnp.maximum(maximum, front_maximum)

    # The maximum only keeps exp() in range; its gradient cancels exactly.
    maximum = jax.lax.stop_gradient(maximum)
    own = jnp.exp(own - maximum[..., None])
    total = own.sum(axis=-1)
    mixed = jnp.einsum(
        "bkms,bksh->bkmh",
        own.reshape(B, K, G * T, -1).astype(dtype),
        values,
        preferred_element_type=jnp.float32,
    ).reshape(B, K, G, T, H)

    if prefix is not None:
        front = jnp.exp(front - maximum.transpose(1, 0, 2, 3).reshape(K, B * G * T, 1))
        total = total + front.sum(axis=-1).reshape(K, B, G, T).transpose(1, 0, 2, 3)
        front_mixed = jnp.einsum(
            "kmp,kph->kmh", front.astype(dtype), prefix.values, preferred_element_type=jnp.float32
        )
        mixed = mixed + front_mixed.reshape(K, B, G, T, H).transpose(1, 0, 2, 3, 4)

    out = (mixed / total[..., None]).astype(dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _capped(scores: Array, softcap: float) -> Array:
    return softcap * jnp.tanh(scores / softcap) if softcap else scores
