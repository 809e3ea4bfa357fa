"""The one decoder: a functional Flax module over layers that are stacked and scanned, or unstacked.

Everything that precedes the tokens is passed as a KV prefix; the module never learns
which kind it is. Given stacked parameters (see `layout`), the layers are scanned by period.
Given parameters that are all unstacked, `layer_0 … layer_25` (see `unstack_layers`), the
same decoder runs unrolled. Prefix and cache may be stacked or unstacked with either.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32, Int

from cartridges_jax.attention import LayerPrefix
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models.cache import Cache
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.layer import Layer, LayerView, layer_view
from cartridges_jax.models.layout import layer_name
from cartridges_jax.models.pointwise import rms_norm
from cartridges_jax.parallel import constrain, on_mesh_of
from cartridges_jax.quantized import Matrix, linear_rows, rows

TAPS = ("queries", "keys", "values")


class Period(nn.Module):
    """One layer of each kind; the body of the scan."""

    config: ModelConfig
    taps: tuple[str, ...] = ()
    remat: bool = False

    @nn.compact
    def __call__(self, carry, prefixes: LayerPrefix | None, views: tuple[LayerView, ...]):
        x, cache, layer = carry
        tapped = []
        for number, view in enumerate(views):
            x, cache, values = _layer(self.remat)(self.config, self.taps, name=str(number))(
                x, cache, layer + number, _at(prefixes, number), view
            )
            tapped.append(values)
        return (x, cache, layer + len(views)), jax.tree.map(lambda *parts: jnp.stack(parts), *tapped)


def _at(prefixes: LayerPrefix | None, layer: int) -> LayerPrefix | None:
    return None if prefixes is None else LayerPrefix(*(part if part is None else part[layer] for part in prefixes))


def _layer(remat: bool) -> type[Layer]:
    return nn.remat(Layer, prevent_cse=False) if remat else Layer


class Decoder(nn.Module):
    """Tokens to hidden states.

    Attributes:
      config: the model's shapes and constants.
      remat: recompute each layer in the backward pass instead of storing its values.
    """

    config: ModelConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"],
        prefix: KVPrefix | None = None,
        cache: Cache | None = None,
        taps: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], Cache | None, dict[str, Float[Array, "L B T _ H"]]]:
        """Runs all layers.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, counted from 0 within a conversation; the prefix's
            `next_position` is added. None: each row continues at its cache's length, or
            starts at 0 without a cache.
          segment_ids: [B, T] int32; 0 is padding. Without a cache, tokens see their own
            segment. With a cache a row is one segment, padded on the right.
          prefix: P slots that every token sees, as far as windows reach.
          cache: tokens are appended to it; S must hold them.
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
        if positions is None:
            lengths = jnp.zeros(tokens.shape[:1], jnp.int32) if cache is None else cache.lengths
            positions = lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if prefix is not None:
            positions = positions + prefix.next_position
        with on_mesh_of(embedding):
            return self._run(embedding, tokens, positions, segment_ids, prefix, cache, taps)

    def _run(self, embedding, tokens, positions, segment_ids, prefix, cache, taps):
        config = self.config
        x = constrain(rows(embedding, constrain(tokens, "lookups", None)), "lookups", None, "lookup_width")
        x = constrain(x, "rows", None, None)
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
        views = tuple(layer_view(config, kind, positions, segment_ids, prefix, cache) for kind in config.period)

        unstacked = self.has_variable("params", layer_name(0))
        num_periods = 0 if unstacked else config.num_layers // len(views)
        scanned = num_periods * len(views)
        prefixes = None if prefix is None else _layer_prefixes(prefix, x.dtype, stacked=scanned > 0)
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
                lambda part: part[:scanned].reshape(num_periods, len(views), *part.shape[1:]), prefixes
            )
            carry, values = periods(carry, by_period, views)
            tapped.append(jax.tree.map(lambda value: value.reshape(scanned, *value.shape[2:]), values))
        x, cache, _ = carry
        for layer in range(scanned, config.num_layers):
            x, cache, values = _layer(self.remat)(config, taps, name=layer_name(layer))(
                x, cache, layer, _at(prefixes, layer), views[layer % len(views)]
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
            # Used by `lm_logits`; declared here so that `init` creates all parameters.
            self.param(
                "lm_head",
                nn.with_logical_partitioning(nn.initializers.normal(config.d_model**-0.5), ("vocab", "embed")),
                (config.vocab_size, config.d_model),
            )
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *tapped)
        # Logits are linear in the hidden states: scaled here, they are scaled wherever the head is applied.
        return rms_norm(x, norm.astype(jnp.float32) * config.logit_scale, config.norm_eps), cache, stacked


def _layer_prefixes(prefix: KVPrefix, dtype: Any, *, stacked: bool) -> LayerPrefix:
    """Keys, values and bias in the dtype of the computation; keys and values stacked for a scan."""
    keys, values = prefix.keys, prefix.values
    if stacked and isinstance(keys, tuple):
        keys, values = jnp.stack(keys), jnp.stack(values)
    keys, values = jax.tree.map(lambda part: part.astype(dtype), (keys, values))
    return LayerPrefix(keys, values, prefix.bias)


def lm_head(params: Any, config: ModelConfig) -> Matrix:
    """The output embedding, [V, D]."""
    return params["lm_head"] if "lm_head" in params else params["embedding"]


def lm_logits(params: Any, config: ModelConfig, hidden: Float[Array, "*rows D"]) -> Float32[Array, "*rows V"]:
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
    """The tree of parameters as the shapes that a checkpoint must fill.

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
