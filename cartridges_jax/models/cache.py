"""A conversation's own keys and values while it is decoded."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from cartridges_jax import cartridge, parallel
from cartridges_jax.models.config import ModelConfig

# One array of all layers, or one for each: see `Cache`.
Layers = Array | tuple[Array, ...]

# Logical names of the axes of stacked keys and values (see `parallel.rules`).
CACHE_AXES = ("layers", "rows", "kv_heads", None, None)


@flax.struct.dataclass
class Cache:
    """Per-row keys and values, filled from slot 0 on.

    Attributes:
      keys: [L, B, K, S, H], after RoPE; or where the layers lie unstacked, which is for CPUs,
        L times [B, K, H, S]: few queries with keys that lie so are multiplied as fast as
        the keys can be read, with [S, H] half as fast.
      values: [L, B, K, S, H], or L times [B, K, S, H].
      lengths: [B] int32, tokens held by each row; slots behind are unread.
    """

    keys: Layers
    values: Layers
    lengths: Array

    @property
    def num_slots(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[-2]

    @property
    def is_unstacked(self) -> bool:
        """Whether every layer has arrays of its own."""
        return isinstance(self.values, tuple)

    def mapped(self, function: Callable[[Array, int], Array]) -> Cache:
        """`function(part, axis of the slots)` of all keys and values; `lengths` stay as they are."""
        slot_axis = -1 if self.is_unstacked else -2
        return self.replace(
            keys=jax.tree.map(lambda part: function(part, slot_axis), self.keys),
            values=jax.tree.map(lambda part: function(part, -2), self.values),
        )

    def extended(self, layer: Array | int, keys: Array, values: Array) -> tuple[Cache, Array, Array]:
        """Writes new tokens behind each row's in one layer; `lengths` stay as they are.

        Args:
          layer: a number where the layers lie unstacked.
          keys, values: [B, T, K, H].

        Returns:
          The cache, and the layer's keys and values [B, K, S, H].
        """
        row = jnp.arange(keys.shape[0])[:, None]
        slots = self.lengths[:, None] + jnp.arange(keys.shape[1])

        if self.is_unstacked:
            own_keys = self.keys[layer].at[row, :, :, slots].set(keys.astype(self.keys[layer].dtype))
            own_values = self.values[layer].at[row, :, slots].set(values.astype(self.values[layer].dtype))

            def with_layer(held: tuple[Array, ...], here: Array) -> tuple[Array, ...]:
                return (*held[:layer], here, *held[layer + 1 :])

            held = self.replace(keys=with_layer(self.keys, own_keys), values=with_layer(self.values, own_values))
            return held, own_keys.swapaxes(-1, -2), own_values
        all_keys, all_values = (
            parallel.constrain(held.at[layer, row, :, slots].set(new.astype(held.dtype)), *CACHE_AXES)
            for held, new in ((self.keys, keys), (self.values, values))
        )
        return self.replace(keys=all_keys, values=all_values), all_keys[layer], all_values[layer]


def empty_cache(
    config: ModelConfig, num_rows: int, num_slots: int, dtype, *, unstacked: bool = False, mesh: Mesh | None = None
) -> Cache:
    """A cache of B rows and S slots that holds nothing.

    Args:
      unstacked: every layer in an array of its own, as suits parameters that lie so.
      mesh: over which it is spread.
    """
    B, K, S, H = num_rows, config.num_kv_heads, num_slots, config.head_dim

    def zeros(*shape: int) -> Layers:
        if unstacked:
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        return parallel.zeros(mesh, CACHE_AXES, (config.num_layers, *shape), dtype)

    return Cache(
        zeros(B, K, H, S) if unstacked else zeros(B, K, S, H),
        zeros(B, K, S, H),
        parallel.zeros(mesh, ("rows",), (B,), jnp.int32),
    )


def row_as_prefix(cache: Cache, row: int, num_tokens: int) -> cartridge.KVPrefix:
    """The first `num_tokens` slots of one row as a prefix at positions 0..num_tokens-1.

    Args:
      cache: with the layers stacked, as prompts are read.
    """
    return cartridge.from_plain_tokens(*(layers[:, row, :, :num_tokens] for layers in (cache.keys, cache.values)))
