"""Masks: the slots that a token may see.

Packed rows (two conversations "a" and "b", then padding "0"); x = may attend; W = may
attend even with a sliding window of 2:

            a a a b b 0
          a W . . . . .
          a W W . . . .
          a x W W . . .
          b . . . W . .
          b . . . W W .
          0 . . . . . W

Every token sees at least itself, so no softmax row is empty. Every token sees the whole
prefix, except for slots that a window has moved past. A window of 0 sees everything.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Int

from cartridges_jax.attention.types import Array


def packed_causal_mask(
    segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None, window: int = 0
) -> Bool[Array, "B T T"]:
    """The mask of packed rows: same segment, not later in the row, and within the window.

    Args:
      segment_ids: [B, T] int32; 0 is padding.
      positions: [B, T] int32, ascending within a segment; needed with a window.
      window: a token sees itself and the `window - 1` positions before it.

    Returns:
      [B, T, T] bool, True where the query (axis 1) may attend to the key (axis 2).
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    num_tokens = segment_ids.shape[1]
    mask = same & jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    if window:
        mask &= positions[:, :, None] - positions[:, None, :] < window
    return mask


def cache_mask(
    lengths: Int[Array, " B"], num_tokens: int, num_slots: int, window: int = 0
) -> Bool[Array, "B {num_tokens} {num_slots}"]:
    """The mask of tokens appended to a cache: they see earlier tokens of their row, and themselves.

    Slots after a row's length hold leftovers of padding; they are not seen, and the row's
    next token overwrites the first of them.

    Args:
      lengths: [B] tokens in the cache before this call.
      num_tokens: T, new tokens, written at lengths .. lengths + T - 1.
      num_slots: S.
      window: as above; a row's slots are consecutive positions.

    Returns:
      [B, T, S] bool.
    """
    own_slot = (lengths[:, None] + jnp.arange(num_tokens))[:, :, None]
    slots = jnp.arange(num_slots)
    mask = slots <= own_slot
    return mask & (own_slot - slots < window) if window else mask


def prefix_mask(positions: Int[Array, "B T"], prefix_positions: Int[Array, " P"], window: int) -> Bool[Array, "B T P"]:
    """The slots of a prefix inside a sliding window, as if they were tokens at their positions.

    Args:
      positions: [B, T] int32, the queries'.
      prefix_positions: [P] int32, where the slots' keys were rotated.

    Returns:
      [B, T, P] bool.
    """
    return positions[:, :, None] - prefix_positions < window
