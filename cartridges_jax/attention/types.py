"""What attention is given beside queries, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
from jax import Array


class LayerPrefix(NamedTuple):
    """One layer of a KV prefix: keys, values [K, P, H]; bias [K, P] or None."""

    keys: Array
    values: Array
    bias: Array | None = None


@flax.struct.dataclass
class PackedRows:
    """What the tokens of packed rows see, told by structure, as kernels want it.

    Stands for `packed_causal_mask` and `prefix_mask` of the same arguments.

    Attributes:
      segment_ids: [B, T] int32; 0 is padding.
      positions: [B, T] int32, strictly ascending within a segment; read with a window.
      prefix_positions: [P] int32 where the window also moves past the prefix's slots;
        None where every token sees all of them. Read with a window.
      window: a token sees itself and the `window - 1` positions before it; 0 is all.
    """

    segment_ids: Array
    positions: Array
    prefix_positions: Array | None = None
    window: int = flax.struct.field(pytree_node=False, default=0)
