"""Which slots a token may see.

Packed rows (two conversations "a" and "b", then padding "0"); x = may attend, and behind
a sliding window of 2 what remains is W:

            a a a b b 0
          a W . . . . .
          a W W . . . .
          a x W W . . .
          b . . . W . .
          b . . . W W .
          0 . . . . . W

Every token sees at least itself, so no softmax row is ever empty. A prefix is seen by
all, except where a window has moved past it. A window of 0 sees everything.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def packed_causal_mask(segment_ids: Array, positions: Array | None = None, window: int = 0) -> Array:
    """Same segment, not later in the row, and within the window.

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


def cache_mask(lengths: Array, num_tokens: int, num_slots: int, window: int = 0) -> Array:
    """New tokens see the slots that hold tokens before them, and themselves.

    Slots behind a row's length hold what padding left there; they are not seen, and
    the row's next token overwrites the first of them.

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


def prefix_mask(positions: Array, prefix_positions: Array, window: int) -> Array:
    """What a sliding window leaves visible of a prefix: what it would of the same tokens.

    Args:
      positions: [B, T] int32, the queries'.
      prefix_positions: [P] int32, where the slots' keys were rotated.

    Returns:
      [B, T, P] bool.
    """
    return positions[:, :, None] - prefix_positions < window
