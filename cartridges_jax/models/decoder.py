"""The one decoder: a functional Flax module, layers stacked and scanned.

Follows the Llama architecture as published in Hugging Face's `transformers`
(pre-norm, rotary grouped-query attention, gated feed-forward layer). Whatever stands
in front of the tokens comes in as a KV prefix; the module never learns which.
"""
from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from cartridges_jax.attention import LayerPrefix, attend, cache_mask, packed_causal_mask
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models.cache import Cache
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.rope import rope_tables, rotate

TAPS = ("queries", "keys", "values")


def linear(x: Array, weight: Array) -> Array:
    """x [..., in] times weight [in, out]."""
    return jnp.einsum("...i,io->...o", x, weight)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


class Layer(nn.Module):
    """Attention and feed-forward layer; the body of the scan over layers."""

    config: ModelConfig
    taps: tuple[str, ...] = ()

    def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        init = nn.initializers.ones if len(shape) == 1 else nn.initializers.normal(shape[0] ** -0.5)
        return self.param(name, nn.with_logical_partitioning(init, axes), shape)

    @nn.compact
    def __call__(self, carry, prefix: LayerPrefix | None, cos: Array, sin: Array, mask: Array):
        config = self.config
        D, N, K, H, F = (
            config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff,
        )
        x, cache, layer = carry
        B, T, _ = x.shape

        h = rms_norm(x, self._weight("attn_norm", (D,), ("embed",)), config.norm_eps)
        queries = linear(h, self._weight("q_proj", (D, N * H), ("embed", "heads"))).reshape(B, T, N, H)
        keys = linear(h, self._weight("k_proj", (D, K * H), ("embed", "kv_heads"))).reshape(B, T, K, H)
        values = linear(h, self._weight("v_proj", (D, K * H), ("embed", "kv_heads"))).reshape(B, T, K, H)
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        tapped = {"queries": queries, "keys": keys, "values": values}
        if cache is None:
            own_keys, own_values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
        else:
            rows = jnp.arange(B)[:, None]
            slots = cache.lengths[:, None] + jnp.arange(T)
            cache = cache.replace(
                keys=cache.keys.at[layer, rows, :, slots].set(keys.astype(cache.keys.dtype)),
                values=cache.values.at[layer, rows, :, slots].set(values.astype(cache.values.dtype)),
            )
            own_keys, own_values = cache.keys[layer], cache.values[layer]
        mixed = attend(queries, own_keys, own_values, mask, prefix).reshape(B, T, N * H)
        x = x + linear(mixed, self._weight("o_proj", (N * H, D), ("heads", "embed")))

        h = rms_norm(x, self._weight("mlp_norm", (D,), ("embed",)), config.norm_eps)
        gate = nn.silu(linear(h, self._weight("gate_proj", (D, F), ("embed", "mlp"))))
        up = linear(h, self._weight("up_proj", (D, F), ("embed", "mlp")))
        x = x + linear(gate * up, self._weight("down_proj", (F, D), ("mlp", "embed")))
        return (x, cache, layer + 1), {name: tapped[name] for name in self.taps}


class Decoder(nn.Module):
    """Tokens to hidden states.

    Attributes:
      config: the model's shapes and constants.
      remat: recompute each layer in the backward pass instead of keeping its values.
    """

    config: ModelConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        prefix: KVPrefix | None = None,
        cache: Cache | None = None,
        taps: tuple[str, ...] = (),
    ) -> tuple[Array, Cache | None, dict[str, Array]]:
        """Runs all layers.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, absolute; behind a prefix they start at its
            `next_position`.
          segment_ids: [B, T] int32; 0 is padding. Without a cache, tokens see their own
            segment. With a cache a row is one segment, padded on the right.
          prefix: P slots that every token sees.
          cache: tokens are appended to it; S must hold them.
          taps: which of `TAPS` to return, stacked over layers.

        Returns:
          hidden [B, T, D] after the final norm; the cache with its lengths advanced by
          each row's real tokens (or None); {tap: [L, B, T, heads, H]}.
        """
        config = self.config
        embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            (config.vocab_size, config.d_model),
        )
        x = embedding[tokens]
        cos, sin = rope_tables(positions, config.head_dim, config.rope_base)
        if cache is None:
            mask = packed_causal_mask(segment_ids)
        else:
            mask = cache_mask(cache.lengths, tokens.shape[1], cache.num_slots)
        layer_prefix = None
        if prefix is not None:
            layer_prefix = LayerPrefix(
                prefix.keys.astype(x.dtype), prefix.values.astype(x.dtype), prefix.bias
            )

        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, taps, name="layers")
        (x, cache, _), tapped = layers((x, cache, jnp.int32(0)), layer_prefix, cos, sin, mask)
        if cache is not None:
            real = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
            cache = cache.replace(lengths=cache.lengths + real)

        norm = self.param(
            "final_norm",
            nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
            (config.d_model,),
        )
        if not config.tie_embeddings:
            # Used by `lm_logits`; declared here so that `init` makes all parameters.
            self.param(
                "lm_head",
                nn.with_logical_partitioning(nn.initializers.normal(config.d_model**-0.5), ("vocab", "embed")),
                (config.vocab_size, config.d_model),
            )
        return rms_norm(x, norm, config.norm_eps), cache, tapped


def lm_logits(params: Any, config: ModelConfig, hidden: Array) -> Array:
    """Logits of the rows that need them.

    Args:
      params: the decoder's parameters.
      hidden: [..., D] as returned by `Decoder`.

    Returns:
      [..., V] float32.
    """
    head = params["embedding"] if config.tie_embeddings else params["lm_head"]
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """The tree of parameters as shapes: what a checkpoint must fill."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), token, token, token)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), nn.meta.unbox(boxed))
