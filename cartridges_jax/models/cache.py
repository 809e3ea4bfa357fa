"""A conversation's own keys and values while it is decoded."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, Int32

from cartridges_jax import cartridge, parallel
from cartridges_jax.models.config import ModelConfig

# One array of all layers, or one for each: see `Cache`.
Layers = Array | tuple[Array, ...]

# Logical names of the axes of stacked keys and values (see `parallel.rules`).
CACHE_AXES = ("layers", "rows", "kv_heads", None, None)


@flax.struct.dataclass
class Cache:
    """Per-row keys and values, filled from slot 0 on.

    The layout is the cache's own business: stacked, or for decoding on a CPU unstacked, with
    keys transposed. A product of few queries with keys [H, S] then runs as fast as the keys
    can be read; with [S, H] it runs half as fast.

    Attributes:
      keys: [L, B, K, S, H], after RoPE; unstacked, L arrays [B, K, H, S].
      values: [L, B, K, S, H]; unstacked, L arrays [B, K, S, H].
      lengths: [B] int32, tokens in each row; later slots are unread.
    """

    keys: Layers
    values: Layers
    lengths: Int32[Array, " B"]

    @property
    def num_rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def num_slots(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[-2]

    @property
    def is_unstacked(self) -> bool:
        """True if every layer has arrays of its own."""
        return isinstance(self.values, tuple)

    def mapped(self, function: Callable[[Array, int], Array]) -> Cache:
        """`function(part, axis of the slots)` of all keys and values; `lengths` are unchanged."""
        slot_axis = -1 if self.is_unstacked else -2
        return self.replace(
            keys=jax.tree.map(lambda part: function(part, slot_axis), self.keys),
            values=jax.tree.map(lambda part: function(part, -2), self.values),
        )

    def extended(
        self, layer: Int[Array, ""] | int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
    ) -> tuple[Cache, Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Writes new tokens after each row's in one layer; `lengths` are unchanged.

        Args:
          layer: a Python int if the cache is unstacked.
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

    def with_rows(self, read: Cache, at: Int[np.ndarray, " R"]) -> Cache:
        """Keys and values of R rows written into rows `at`; `lengths` are unchanged.

        Starts compiled programs itself, so it is not for use inside of one. The keys and values
        of the cache are donated. Unstacked, each layer is a call of one small program: one large
        program took a second to compile, for every B, S, R and W, and was no faster.

        Args:
          read: R rows of W slots, stacked.
          at: [R]; a row may occur twice if both write the same.
        """
        if self.is_unstacked:
            return self.replace(
                keys=tuple(
                    put_rows(into, read.keys, at, np.int32(layer), transposed=True)
                    for layer, into in enumerate(self.keys)
                ),
                values=tuple(
                    put_rows(into, read.values, at, np.int32(layer)) for layer, into in enumerate(self.values)
                ),
            )
        return self.replace(keys=put_rows(self.keys, read.keys, at), values=put_rows(self.values, read.values, at))

    def constrained(self) -> Cache:
        """The cache placed as `empty_cache` places it, inside of a program."""
        return Cache(
            keys=parallel.constrain(self.keys, *CACHE_AXES),
            values=parallel.constrain(self.values, *CACHE_AXES),
            lengths=parallel.constrain(self.lengths, "rows"),
        )


@functools.partial(jax.jit, static_argnames=("transposed",), donate_argnames=("into",))
def put_rows(into: Array, new: Array, at: Array, layer: Array | None = None, *, transposed: bool = False) -> Array:
    """Writes rows of `new` [L, R, K, W, H] into rows `at` of a cache's array; of one layer if that has one.

    Args:
      transposed: `into` has [H, S] instead of [S, H].
    """
    if layer is not None:
        new = jax.lax.dynamic_index_in_dim(new, layer, keepdims=False)
    new = new[..., : into.shape[-1 if transposed else -2], :]
    if transposed:
        new = new.swapaxes(-1, -2)

    # Row by row: one scatter of all would be a loop over single numbers on the CPU.
    def put(r: Array, into: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(new, r, 1, axis=new.ndim - 4)
        start = (0,) * (into.ndim - 4) + (at[r], 0, 0, 0)
        return jax.lax.dynamic_update_slice(into, row.astype(into.dtype), start)

    into = jax.lax.fori_loop(0, at.shape[0], put, into)
    with parallel.on_mesh_of(into):
        return parallel.constrain(into, *CACHE_AXES)


def empty_cache(
    config: ModelConfig, num_rows: int, num_slots: int, dtype, *, unstacked: bool = False, mesh: Mesh | None = None
) -> Cache:
    """A cache of B rows and S slots that holds nothing; callers with a `Model` use its methods.

    Args:
      unstacked: arrays of its own for every layer, as suits unstacked parameters.
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
      cache: stacked, as prompts are read.
    """
    return cartridge.from_plain_tokens(*(layers[:, row, :, :num_tokens] for layers in (cache.keys, cache.values)))
