"""One decoder layer: pre-norm, rotary grouped-query attention, gated feed-forward layer.

Follows the Llama architecture and its descendants as published in Hugging Face's
`transformers`; what a family adds to it is a field of the config.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from cartridges_jax.attention import LayerPrefix, PackedRows, attend, cache_mask, packed_view, prefix_mask
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models.cache import Cache
from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.pointwise import gated, rms_norm
from cartridges_jax.parallel import constrain
from cartridges_jax.quantized import Matrix, linear
from cartridges_jax.rope import rope_tables, rotate


class LayerView(NamedTuple):
    """The rotation and the visible slots of a batch in the layers of one kind.

    Attributes:
      rotation: (cos, sin), [B, T, H / 2] each; None in layers without positions.
      own: the visible slots of the conversation, `mask` of `attention.attend`.
      prefix: those of the prefix, its `prefix_mask`.
    """

    rotation: tuple[Array, Array] | None
    own: Array | PackedRows
    prefix: Array | None


def layer_view(
    config: ModelConfig,
    kind: LayerKind,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    prefix: KVPrefix | None,
    cache: Cache | None,
) -> LayerView:
    """The view of the layers of one kind, computed once for all of them.

    Args:
      positions: absolute, the prefix's `next_position` included.
    """
    rotation = None if kind.rope is None else rope_tables(positions, config.head_dim, kind.rope)
    passed = prefix.positions if prefix is not None and config.windows_see_prefix else None
    if cache is None:
        own, of_prefix = packed_view(segment_ids, positions, passed, window=kind.window, head_dim=config.head_dim)
    else:
        own = cache_mask(cache.lengths, positions.shape[1], cache.num_slots, kind.window)
        of_prefix = prefix_mask(positions, passed, kind.window) if kind.window and passed is not None else None
    return LayerView(rotation, own, of_prefix)


class Layer(nn.Module):
    """Attention and feed-forward layer."""

    config: ModelConfig
    taps: tuple[str, ...] = ()

    def _matrix(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Matrix:
        init = nn.initializers.normal(shape[0] ** -0.5)
        return self.param(name, nn.with_logical_partitioning(init, axes), shape)

    # Vectors along the model's width are too small to be split.
    def _norm(self, x: Array, name: str) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        return rms_norm(x, self.param(name, init, x.shape[-1:]), self.config.norm_eps)

    def _bias(self, x: Array, name: str, axis: str | None) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, (axis,))
        return x + self.param(name, init, x.shape[-1:]).astype(x.dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None,
        layer: Int[Array, ""] | int,
        prefix: LayerPrefix | None,
        view: LayerView,
    ) -> tuple[Float[Array, "B T D"], Cache | None, dict[str, Array]]:
        """Runs the layer; returns hidden states, the extended cache and the tapped values [B, T, heads, H]."""
        config = self.config
        D, N, K, H, F = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff
        B, T, _ = x.shape
        prefix = _gathered(prefix)

        h = self._norm(x, "attn_norm") if config.pre_norms else x
        queries = linear(h, self._matrix("q_proj", (D, N * H), ("embed", "heads")))
        keys = linear(h, self._matrix("k_proj", (D, K * H), ("embed", "kv_heads")))
        values = linear(h, self._matrix("v_proj", (D, K * H), ("embed", "kv_heads")))
        if config.qkv_bias:
            queries = self._bias(queries, "q_bias", "heads")
            keys = self._bias(keys, "k_bias", "kv_heads")
            values = self._bias(values, "v_bias", "kv_heads")
        if config.qk_norm and config.qk_norm_joint:
            queries, keys = self._norm(queries, "q_norm"), self._norm(keys, "k_norm")
        queries, keys, values = queries.reshape(B, T, N, H), keys.reshape(B, T, K, H), values.reshape(B, T, K, H)
        if config.qk_norm and not config.qk_norm_joint:
            queries, keys = self._norm(queries, "q_norm"), self._norm(keys, "k_norm")
        if view.rotation is not None:
            queries, keys = rotate(queries, *view.rotation), rotate(keys, *view.rotation)
        tapped = {"queries": queries, "keys": keys, "values": values}
        if cache is None:
            own_keys, own_values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
        else:
            cache, own_keys, own_values = cache.extended(layer, keys, values)
        attention_output = attend(
            queries,
            own_keys,
            own_values,
            view.own,
            prefix,
            prefix_mask=view.prefix,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        ).reshape(B, T, N * H)
        h = linear(attention_output, self._matrix("o_proj", (N * H, D), ("heads", "embed")))
        if config.o_bias:
            h = self._bias(h, "o_bias", None)
        if config.post_norms:
            h = self._norm(h, "post_attn_norm")
        x = x + _scaled(h, config.residual_scale)

        h = self._norm(x, "mlp_norm") if config.pre_norms else x
        gate = linear(h, self._matrix("gate_proj", (D, F), ("embed", "mlp")))
        up = linear(h, self._matrix("up_proj", (D, F), ("embed", "mlp")))
        if config.mlp_bias:
            gate, up = self._bias(gate, "gate_bias", "mlp"), self._bias(up, "up_bias", "mlp")
        h = linear(gated(config.activation, gate, up), self._matrix("down_proj", (F, D), ("mlp", "embed")))
        if config.mlp_bias:
            h = self._bias(h, "down_bias", None)
        if config.post_norms:
            h = self._norm(h, "post_mlp_norm")
        x = constrain(x + _scaled(h, config.residual_scale), "rows", None, None)
        return x, cache, {name: tapped[name] for name in self.taps}


def _scaled(x: Array, scale: float) -> Array:
    """x * scale in float32: in bfloat16 the scale itself would be 0.1 % off (Granite's 0.22)."""
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


def _gathered(prefix: LayerPrefix | None) -> LayerPrefix | None:
    """A layer's prefix as attention uses it: on a mesh every row sees all slots."""
    return jax.tree.map(lambda part: constrain(part, *("kv_heads", "slots", None)[: part.ndim]), prefix)
