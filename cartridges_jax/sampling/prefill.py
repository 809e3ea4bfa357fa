"""Reading one text: a KV prefix of it, and its logits for checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from cartridges_jax import cartridge, parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model, row_as_prefix
from cartridges_jax.sampling.buckets import round_up
from cartridges_jax.sampling.reading import read_tokens, read_tokens_for_logits
from cartridges_jax.sampling.request import PrefixHandle

# Tokens read per dispatch: bounds the attention scores at N x CHUNK x S.
CHUNK = 512


def check_token_ids(
    model: Model, token_ids: Sequence[int], prefix: KVPrefix | PrefixHandle | None, room: int = 0
) -> None:
    """Refuses tokens that the model cannot read.

    Args:
      room: tokens that will be generated after `token_ids`.

    Raises:
      UserError: no tokens, ids outside the vocabulary, or positions beyond the context.
    """
    if len(token_ids) == 0:
        raise UserError("there are no tokens to read: give at least one")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= model.config.vocab_size:
        raise UserError(f"token id {low if low < 0 else high} is outside the vocabulary of {model.config.vocab_size}")
    start = 0 if prefix is None else int(prefix.next_position)
    if start + len(token_ids) + room > model.config.context_length:
        raise UserError(
            f"{start} prefix positions + {len(token_ids)} tokens + {room} to generate exceed the "
            f"model's context of {model.config.context_length}: shorten the text"
        )


def chunk_shape(num_tokens: int) -> tuple[int, int]:
    """(tokens of a chunk, slots of the cache) for a text of T tokens."""
    size = min(CHUNK, round_up(num_tokens, 64))
    return size, round_up(num_tokens, size)


def _chunks(token_ids: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and segment ids, [1, size] int32 each, chunk by chunk."""
    size, num_slots = chunk_shape(len(token_ids))
    tokens = np.zeros((1, num_slots), np.int32)
    tokens[0, : len(token_ids)] = token_ids
    segment_ids = (np.arange(num_slots) < len(token_ids)).astype(np.int32)[None]
    for begin in range(0, num_slots, size):
        window = slice(begin, begin + size)
        yield tokens[:, window], segment_ids[:, window]


def prefill(model: Model, token_ids: Sequence[int], prefix: KVPrefix | None = None) -> KVPrefix:
    """Reads tokens into a KV prefix.

    Args:
      token_ids: T ids, read as they are (no BOS, no template is added).
      prefix: precedes them; the result then stands for both.

    Returns:
      A prefix of T slots, or P + T after a prefix of P, in the model's dtype.

    Raises:
      UserError: no tokens, unknown ids, or more than the model's context holds.
    """
    check_token_ids(model, token_ids, prefix)
    cache = model.reading_cache(1, chunk_shape(len(token_ids))[1])
    for tokens, segment_ids in _chunks(token_ids):
        cache = read_tokens(model.config, model.params, prefix, cache, tokens, segment_ids)
    read = row_as_prefix(cache, 0, len(token_ids))
    if prefix is None:
        return read
    joined = cartridge.compose(prefix.astype(model.dtype), read)
    return joined.replace(positions=jnp.concatenate([prefix.positions, prefix.next_position + read.positions]))


def logits(model: Model, token_ids: Sequence[int], prefix: KVPrefix | None = None) -> Float32[np.ndarray, "T V"]:
    """Next-token logits at every position, for checks.

    Raises:
      UserError: as `prefill`.
    """
    check_token_ids(model, token_ids, prefix)
    cache = model.reading_cache(1, chunk_shape(len(token_ids))[1])
    rows = []
    for tokens, segment_ids in _chunks(token_ids):
        found, cache = read_tokens_for_logits(model.config, model.params, prefix, cache, tokens, segment_ids)
        rows.append(parallel.fetch(found)[0])
    return np.concatenate(rows)[: len(token_ids)]
