"""The compiled programs that read texts: prompts for the engine in chunks, and one text at a time.

R prompts of W slots are read in a cache of their own, apart from the B rows of S slots that
decode, so that reading compiles for R, W and the chunk and not for every B and S too.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Cache, Decoder, ModelConfig, lm_logits
from cartridges_jax.parallel import constrain, on_mesh_of
from cartridges_jax.sampling.rows import Outputs, Rows, choose_tokens, continues, for_host
from cartridges_jax.sampling.select import Choice


def _apply(config, params, prefix, cache, tokens, segment_ids) -> tuple[Array, Cache]:
    hidden, cache, _ = Decoder(config).apply({"params": params}, tokens, None, segment_ids, prefix=prefix, cache=cache)
    return hidden, cache


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def read_tokens(
    config: ModelConfig,
    params: Any,
    prefix: KVPrefix | None,
    cache: Cache,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Cache:
    """Appends tokens to a cache; hidden states are dropped."""
    return _apply(config, params, prefix, cache, tokens, segment_ids)[1]


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def read_tokens_for_logits(
    config: ModelConfig,
    params: Any,
    prefix: KVPrefix | None,
    cache: Cache,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float32[Array, "B T V"], Cache]:
    """Appends tokens to a cache; returns the logits after each of them, and the cache."""
    hidden, cache = _apply(config, params, prefix, cache, tokens, segment_ids)
    return lm_logits(params, config, hidden), cache


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache", "last"))
def read_chunk(
    config: ModelConfig,
    params: Any,
    prefix: KVPrefix | None,
    cache: Cache,
    last: Float[Array, "R D"],
    tokens: Int[Array, "R T"],
    segment_ids: Int[Array, "R T"],
) -> tuple[Cache, Float[Array, "R D"]]:
    """Appends a chunk of prompts to their cache of W slots.

    Args:
      prefix: resident, of either layout.
      last: the hidden state of each row's last token so far.

    Returns:
      The cache, and `last` after the chunk.
    """
    hidden, cache = _apply(config, params, prefix, cache, tokens, segment_ids)
    count = jnp.sum(segment_ids, axis=1)
    newest = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    with on_mesh_of(params):
        return cache.constrained(), constrain(jnp.where((count > 0)[:, None], newest, last), "rows", None)


@functools.partial(jax.jit, static_argnames=("config", "choice", "num_top"))
def first_tokens(
    config: ModelConfig, params: Any, last: Float[Array, "R D"], rows: Rows, *, choice: Choice, num_top: int
) -> tuple[Bool[Array, " R"], Outputs]:
    """Chooses the first tokens after prompts that were read to their end.

    Returns:
      running [R], whether a second token follows; outputs [1, R].
    """
    logits = lm_logits(params, config, last)
    token, top_ids, top = choose_tokens(logits, jnp.zeros((last.shape[0],), jnp.int32), rows, choice, num_top)
    with on_mesh_of(params):
        running = constrain(continues(token, jnp.ones_like(token), rows), "rows")
        return running, for_host((token[None], top_ids[None], top[None]))
