"""A conversation's own keys and values while it is decoded."""
from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from cartridges_jax import cartridge, parallel
from cartridges_jax.models.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """Per-row keys and values, filled from slot 0 on.

    Attributes:
      keys: [L, B, K, S, H], after RoPE.
      values: [L, B, K, S, H].
      lengths: [B] int32, tokens held by each row; slots behind are unread.
    """

    keys: Array
    values: Array
    lengths: Array

    @property
    def num_slots(self) -> int:
        return self.keys.shape[3]


# Logical names of the axes of keys and values (see `parallel.rules`).
CACHE_AXES = ("layers", "rows", "kv_heads", None, None)


def empty_cache(config: ModelConfig, num_rows: int, num_slots: int, dtype, mesh: Mesh | None = None) -> Cache:
    """A cache of B rows and S slots that holds nothing."""
    shape = (config.num_layers, num_rows, config.num_kv_heads, num_slots, config.head_dim)
    return Cache(
        keys=parallel.zeros(mesh, CACHE_AXES, shape, dtype),
        values=parallel.zeros(mesh, CACHE_AXES, shape, dtype),
        lengths=parallel.zeros(mesh, ("rows",), (num_rows,), jnp.int32),
    )


def row_as_prefix(cache: Cache, row: int, num_tokens: int) -> cartridge.KVPrefix:
    """The first `num_tokens` slots of one row as a prefix at positions 0..num_tokens-1."""
    return cartridge.from_plain_tokens(
        cache.keys[:, row, :, :num_tokens], cache.values[:, row, :, :num_tokens]
    )
