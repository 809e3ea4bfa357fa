"""A conversation's own keys and values while it is decoded."""
from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from cartridges_jax import cartridge, parallel
from cartridges_jax.models.config import ModelConfig

# One array of all layers, or one for each: see `empty_cache`.
Layers = Array | tuple[Array, ...]

# Logical names of the axes of stacked keys and values (see `parallel.rules`).
CACHE_AXES = ("layers", "rows", "kv_heads", None, None)


@flax.struct.dataclass
class Cache:
    """Per-row keys and values, filled from slot 0 on.

    Attributes:
      keys: [L, B, K, S, H], after RoPE; or L times [B, K, S, H].
      values: as `keys`.
      lengths: [B] int32, tokens held by each row; slots behind are unread.
    """

    keys: Layers
    values: Layers
    lengths: Array

    @property
    def num_slots(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[-2]

    def apart(self) -> Cache:
        """The same with every layer in an array of its own."""
        return self.replace(keys=tuple(self.keys), values=tuple(self.values))

    def extended(self, layer: Array | int, keys: Array, values: Array) -> tuple[Cache, Array, Array]:
        """Writes new tokens behind each row's in one layer; `lengths` stay as they are.

        Args:
          layer: a number where the layers lie apart.
          keys, values: [B, T, K, H].

        Returns:
          The cache, and the layer's keys and values [B, K, S, H].
        """
        row = jnp.arange(keys.shape[0])[:, None]
        slots = self.lengths[:, None] + jnp.arange(keys.shape[1])

        def put(held: Layers, new: Array) -> tuple[Layers, Array]:
            if isinstance(held, tuple):
                here = held[layer].at[row, :, slots].set(new.astype(held[layer].dtype))
                return (*held[:layer], here, *held[layer + 1 :]), here
            held = parallel.constrain(held.at[layer, row, :, slots].set(new.astype(held.dtype)), *CACHE_AXES)
            return held, held[layer]

        all_keys, own_keys = put(self.keys, keys)
        all_values, own_values = put(self.values, values)
        return self.replace(keys=all_keys, values=all_values), own_keys, own_values


def empty_cache(
    config: ModelConfig, num_rows: int, num_slots: int, dtype, *, apart: bool = False, mesh: Mesh | None = None
) -> Cache:
    """A cache of B rows and S slots that holds nothing.

    Args:
      apart: every layer in an array of its own, as suits parameters that lie so.
      mesh: over which it is spread.
    """
    shape = (num_rows, config.num_kv_heads, num_slots, config.head_dim)

    def zeros() -> Layers:
        if apart:
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        return parallel.zeros(mesh, CACHE_AXES, (config.num_layers, *shape), dtype)

    return Cache(zeros(), zeros(), parallel.zeros(mesh, ("rows",), (num_rows,), jnp.int32))


def row_as_prefix(cache: Cache, row: int, num_tokens: int) -> cartridge.KVPrefix:
    """The first `num_tokens` slots of one row as a prefix at positions 0..num_tokens-1."""

    def stacked(layers: Layers) -> Array:
        if isinstance(layers, tuple):
            return jnp.stack([layer[row, :, :num_tokens] for layer in layers])
        return layers[:, row, :, :num_tokens]

    return cartridge.from_plain_tokens(stacked(cache.keys), stacked(cache.values))
