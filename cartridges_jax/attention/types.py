"""Operands of attention beside queries, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Float, Float32, Int32

Array = jax.Array | np.ndarray


class LayerPrefix(NamedTuple):
    """One layer of a KV prefix: keys, values [K, P, H]; bias [K, P] or None."""

    keys: Float[Array, "K P H"]
    values: Float[Array, "K P H"]
    bias: Float32[Array, "K P"] | None = None


@flax.struct.dataclass
class PackedRows:
    """The structure of packed rows, from which kernels derive which slots a token sees.

    Equivalent to `packed_causal_mask` and `prefix_mask` of the same arguments.

    Attributes:
      segment_ids: [B, T] int32; 0 is padding.
      positions: [B, T] int32, strictly ascending within a segment; read with a window.
      prefix_positions: [P] int32 where the window also moves past the prefix's slots;
        None where every token sees all of them. Read with a window.
      window: a token sees itself and the `window - 1` positions before it; 0 is all.
    """

    segment_ids: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    prefix_positions: Int32[Array, " P"] | None = None
    window: int = flax.struct.field(pytree_node=False, default=0)
