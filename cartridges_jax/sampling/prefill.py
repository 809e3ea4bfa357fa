"""Reading tokens: a KV prefix out of a text, and logits for checks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cartridges_jax import cartridge, parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.models import Cache, Decoder, Model, ModelConfig, empty_cache, lm_logits, row_as_prefix
from cartridges_jax.sampling.buckets import round_up
from cartridges_jax.sampling.request import PrefixHandle

# Tokens read per dispatch: bounds the attention scores at N x CHUNK x S.
CHUNK = 512


def check_token_ids(
    model: Model, token_ids: Sequence[int], prefix: KVPrefix | PrefixHandle | None, room: int = 0
) -> None:
    """Refuses what the model cannot read.

    Args:
      room: tokens that will be generated behind `token_ids`.

    Raises:
      UserError: no tokens, ids outside the vocabulary, or positions beyond the context.
    """
    if len(token_ids) == 0:
        raise UserError("there are no tokens to read: give at least one")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= model.config.vocab_size:
        raise UserError(f"token id {low if low < 0 else high} is outside the vocabulary of {model.config.vocab_size}")
    start = 0 if prefix is None else prefix.next_position
    if start + len(token_ids) + room > model.config.context_length:
        raise UserError(
            f"{start} prefix positions + {len(token_ids)} tokens + {room} to generate exceed the "
            f"model's context of {model.config.context_length}: shorten the text"
        )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def read_tokens(
    config: ModelConfig, params: Any, prefix: KVPrefix | None, cache: Cache, tokens: Array, segment_ids: Array
) -> tuple[Array, Cache]:
    """Appends tokens [B, T] to a cache; returns hidden [B, T, D] and the cache."""
    start = 0 if prefix is None else prefix.next_position
    positions = start + cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache, _ = Decoder(config).apply(
        {"params": params}, tokens, positions, segment_ids, prefix=prefix, cache=cache
    )
    return hidden, cache


def _read_chunks(model: Model, token_ids: Sequence[int], prefix: KVPrefix | None):
    """Reads one row in chunks; returns hidden [T, D] per chunk and the filled cache."""
    size = min(CHUNK, round_up(len(token_ids), 64))
    num_slots = round_up(len(token_ids), size)
    tokens = np.zeros((1, num_slots), np.int32)
    tokens[0, : len(token_ids)] = token_ids
    segment_ids = (np.arange(num_slots) < len(token_ids)).astype(np.int32)[None]
    cache = empty_cache(model.config, 1, num_slots, model.dtype, mesh=model.mesh)
    hidden = []
    for begin in range(0, num_slots, size):
        window = slice(begin, begin + size)
        rows, cache = read_tokens(model.config, model.params, prefix, cache, tokens[:, window], segment_ids[:, window])
        hidden.append(rows[0])
    return hidden, cache


def prefill(model: Model, token_ids: Sequence[int], prefix: KVPrefix | None = None) -> KVPrefix:
    """Tokens to a KV prefix.

    Args:
      token_ids: T ids, read as they are (no BOS, no template is added).
      prefix: what stands before them; the result then stands for both.

    Returns:
      A prefix of T slots, or P + T behind a prefix of P, in the model's dtype.

    Raises:
      UserError: no tokens, unknown ids, or more than the model's context holds.
    """
    check_token_ids(model, token_ids, prefix)
    _, cache = _read_chunks(model, token_ids, prefix)
    read = row_as_prefix(cache, 0, len(token_ids))
    if prefix is None:
        return read
    joined = cartridge.compose(prefix.astype(model.dtype), read)
    return joined.replace(
        positions=jnp.concatenate([prefix.positions, prefix.next_position + read.positions]),
        group=jnp.concatenate([prefix.group, jnp.full_like(read.group, prefix.group[-1])]),
    )


@functools.partial(jax.jit, static_argnames=("config",))
def _logits(config: ModelConfig, params: Any, hidden: Array) -> Array:
    return lm_logits(params, config, hidden)


def logits(model: Model, token_ids: Sequence[int], prefix: KVPrefix | None = None) -> np.ndarray:
    """Next-token logits at every position, for checks.

    Returns:
      [T, V] float32.

    Raises:
      UserError: as `prefill`.
    """
    check_token_ids(model, token_ids, prefix)
    hidden, _ = _read_chunks(model, token_ids, prefix)
    rows = [parallel.fetch(_logits(model.config, model.params, chunk)) for chunk in hidden]
    return np.concatenate(rows)[: len(token_ids)]
