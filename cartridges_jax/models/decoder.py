"""The one decoder: a functional Flax module, layers stacked and scanned, or unstacked.

Follows the Llama architecture and its descendants as published in Hugging Face's
`transformers`: pre-norm, rotary grouped-query attention, gated feed-forward layer; what
families add to it is a field of the config. Whatever stands in front of the tokens comes
in as a KV prefix; the module never learns which.

Layers are scanned by period, so that a layer's kind (its window, its rotation) is known
when the program is traced; what is left over after whole periods follows unrolled. The
parameters of Gemma 3 with its 26 layers lie so:

    layers/0 … layers/5   [4, …] each: position 0..5 of the four whole periods
    layer_24, layer_25    the two layers behind them

Given parameters that all lie unstacked, `layer_0 … layer_25` (see `unstack_layers`), the same
decoder runs unrolled.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from cartridges_jax.attention import LayerPrefix, PackedRows, attend, cache_mask, packed_view, prefix_mask
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models.cache import Cache
from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.pointwise import gated, rms_norm
from cartridges_jax.parallel import constrain, on_mesh_of
from cartridges_jax.quantized import Matrix, linear, linear_rows, rows
from cartridges_jax.rope import rope_tables, rotate

TAPS = ("queries", "keys", "values")


class _View(NamedTuple):
    """What a layer's kind makes of the batch: its rotation and what its tokens see."""

    turn: tuple[Array, Array] | None
    own: Array | PackedRows
    prefix: Array | None


class Layer(nn.Module):
    """Attention and feed-forward layer."""

    config: ModelConfig
    taps: tuple[str, ...] = ()

    def _matrix(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Array:
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
    def __call__(self, x: Array, cache: Cache | None, layer: Array | int, prefix: LayerPrefix | None, view: _View):
        config = self.config
        D, N, K, H, F = (
            config.d_model,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.d_ff,
        )
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
        if view.turn is not None:
            queries, keys = rotate(queries, *view.turn), rotate(keys, *view.turn)
        tapped = {"queries": queries, "keys": keys, "values": values}
        if cache is None:
            own_keys, own_values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
        else:
            cache, own_keys, own_values = cache.extended(layer, keys, values)
        mixed = attend(
            queries,
            own_keys,
            own_values,
            view.own,
            prefix,
            prefix_mask=view.prefix,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        ).reshape(B, T, N * H)
        mixed = linear(mixed, self._matrix("o_proj", (N * H, D), ("heads", "embed")))
        if config.o_bias:
            mixed = self._bias(mixed, "o_bias", None)
        if config.post_norms:
            mixed = self._norm(mixed, "post_attn_norm")
        x = x + _scaled(mixed, config.residual_scale)

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
    """A layer's prefix as it is computed with: on a mesh every row sees all slots."""
    return jax.tree.map(lambda part: constrain(part, *("kv_heads", "slots", None)[: part.ndim]), prefix)


class Period(nn.Module):
    """One layer of each kind; the body of the scan."""

    config: ModelConfig
    taps: tuple[str, ...] = ()
    remat: bool = False

    @nn.compact
    def __call__(self, carry, prefix: LayerPrefix | None, views: tuple[_View, ...]):
        x, cache, layer = carry
        tapped = []
        for number, view in enumerate(views):
            x, cache, values = _layer(self.remat)(self.config, self.taps, name=str(number))(
                x, cache, layer + number, _at(prefix, number), view
            )
            tapped.append(values)
        return (x, cache, layer + len(views)), jax.tree.map(lambda *parts: jnp.stack(parts), *tapped)


def _at(fronts: LayerPrefix | None, layer: int) -> LayerPrefix | None:
    return None if fronts is None else LayerPrefix(*(part if part is None else part[layer] for part in fronts))


def _layer(remat: bool) -> type[Layer]:
    return nn.remat(Layer, prevent_cse=False) if remat else Layer


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
          prefix: P slots that every token sees, as far as windows reach.
          cache: tokens are appended to it; S must hold them. Where the layers of the
            parameters lie unstacked, those of prefix and cache may too.
          taps: which of `TAPS` to return, stacked over layers.

        Returns:
          hidden [B, T, D] after the final norm, times `logit_scale`; the cache with its
          lengths advanced by each row's real tokens (or None); {tap: [L, B, T, heads, H]}.
        """
        embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            (self.config.vocab_size, self.config.d_model),
        )
        with on_mesh_of(embedding):
            return self._run(embedding, tokens, positions, segment_ids, prefix, cache, taps)

    def _run(self, embedding, tokens, positions, segment_ids, prefix, cache, taps):
        config = self.config
        x = constrain(rows(embedding, constrain(tokens, "lookups", None)), "lookups", None, "lookup_width")
        x = constrain(x, "rows", None, None)
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
        views = tuple(_view(config, kind, positions, segment_ids, prefix, cache) for kind in config.period)
        fronts = None
        if prefix is not None:
            as_computed = functools.partial(jax.tree.map, lambda part: part.astype(x.dtype))
            fronts = LayerPrefix(as_computed(prefix.keys), as_computed(prefix.values), prefix.bias)

        unstacked = self.has_variable("params", layer_name(0))
        num_periods = 0 if unstacked else config.num_layers // len(views)
        scanned = num_periods * len(views)
        carry, tapped = (x, cache, jnp.int32(0)), []
        if num_periods:
            periods = nn.scan(
                Period,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=num_periods,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(config, taps, self.remat, name="layers")
            by_period = jax.tree.map(
                lambda part: part[:scanned].reshape(num_periods, len(views), *part.shape[1:]), fronts
            )
            carry, values = periods(carry, by_period, views)
            tapped.append(jax.tree.map(lambda value: value.reshape(scanned, *value.shape[2:]), values))
        x, cache, _ = carry
        for layer in range(scanned, config.num_layers):
            x, cache, values = _layer(self.remat)(config, taps, name=layer_name(layer))(
                x, cache, layer, _at(fronts, layer), views[layer % len(views)]
            )
            tapped.append(jax.tree.map(lambda value: value[None], values))
        if cache is not None:
            real = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
            cache = cache.replace(lengths=cache.lengths + real)

        norm = self.param(
            "final_norm",
            nn.with_logical_partitioning(nn.initializers.ones, (None,)),
            (config.d_model,),
        )
        if not config.tie_embeddings:
            # Used by `lm_logits`; declared here so that `init` makes all parameters.
            self.param(
                "lm_head",
                nn.with_logical_partitioning(nn.initializers.normal(config.d_model**-0.5), ("vocab", "embed")),
                (config.vocab_size, config.d_model),
            )
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *tapped)
        # Logits are linear in what is returned: scaled here, they are so wherever the head is applied.
        return rms_norm(x, norm.astype(jnp.float32) * config.logit_scale, config.norm_eps), cache, stacked


def _view(
    config: ModelConfig,
    kind: LayerKind,
    positions: Array,
    segment_ids: Array,
    prefix: KVPrefix | None,
    cache: Cache | None,
) -> _View:
    turn = None if kind.rope is None else rope_tables(positions, config.head_dim, kind.rope)
    passed = prefix.positions if prefix is not None and config.windows_see_prefix else None
    if cache is None:
        own, front = packed_view(segment_ids, positions, passed, window=kind.window, head_dim=config.head_dim)
    else:
        own = cache_mask(cache.lengths, positions.shape[1], cache.num_slots, kind.window)
        front = prefix_mask(positions, passed, kind.window) if kind.window and passed is not None else None
    return _View(turn, own, front)


def lm_head(params: Any, config: ModelConfig) -> Matrix:
    """The output embedding, [V, D]."""
    return params["lm_head"] if "lm_head" in params else params["embedding"]


def lm_logits(params: Any, config: ModelConfig, hidden: Array) -> Array:
    """Logits of the rows that need them.

    Args:
      params: the decoder's parameters.
      hidden: [..., D] as returned by `Decoder`.

    Returns:
      [..., V] float32.
    """
    logits = linear_rows(hidden, lm_head(params, config))
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


def _declared_params(config: ModelConfig) -> Any:
    """The tree of parameters as shapes, each in a box with the names of its axes."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), token, token, token)["params"]


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """The tree of parameters as shapes: what a checkpoint must fill.

    Norms and biases stay float32: they are small, and Gemma's norms are 1 + w with a
    small w, which bfloat16 would round away.
    """

    def leaf(path, value):
        name = path[-1].key
        return jax.ShapeDtypeStruct(value.shape, jnp.float32 if name.endswith(("norm", "bias")) else dtype)

    return jax.tree_util.tree_map_with_path(leaf, nn.meta.unbox(_declared_params(config)))


def param_axes(config: ModelConfig) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Path of every parameter to the logical names of its axes (see `parallel.rules`)."""
    specs = nn.get_partition_spec(_declared_params(config))
    return {
        tuple(key.key for key in path): tuple(spec)
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    }


def layer_name(layer: int) -> str:
    """Where the parameters of a layer lie that is in no stack."""
    return f"layer_{layer}"


def layer_path(config: ModelConfig, layer: int) -> tuple[tuple[str, ...], int | None]:
    """Where the parameters of a layer are loaded to: keys into the tree, and the index in the stack.

    The index is None for a layer behind the last whole period, which has no stack.
    """
    period, number = divmod(layer, len(config.period))
    if period < config.num_layers // len(config.period):
        return ("layers", str(number)), period
    return (layer_name(layer),), None
