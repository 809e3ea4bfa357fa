"""Which of the conversation's own slots a token may see. The prefix is always seen.

Packed rows (two conversations "a" and "b", then padding "0"); x = may attend:

            a a a b b 0
          a x . . . . .
          a x x . . . .
          a x x x . . .
          b . . . x . .
          b . . . x x .
          0 . . . . . x

Every token sees at least itself, so no softmax row is ever empty.
"""
from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def packed_causal_mask(segment_ids: Array) -> Array:
    """Same segment and not later in the row.

    Args:
      segment_ids: [B, T] int32; 0 is padding.

    Returns:
      [B, T, T] bool, True where the query (axis 1) may attend to the key (axis 2).
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    num_tokens = segment_ids.shape[1]
    return same & jnp.tril(jnp.ones((num_tokens, num_tokens), bool))


def cache_mask(lengths: Array, num_tokens: int, num_slots: int) -> Array:
    """New tokens see the slots that hold tokens before them, and themselves.

    Slots behind a row's length hold what padding left there; they are not seen, and
    the row's next token overwrites the first of them.

    Args:
      lengths: [B] tokens in the cache before this call.
      num_tokens: T, new tokens, written at lengths .. lengths + T - 1.
      num_slots: S.

    Returns:
      [B, T, S] bool.
    """
    own_slot = lengths[:, None] + jnp.arange(num_tokens)
    return jnp.arange(num_slots) <= own_slot[:, :, None]
