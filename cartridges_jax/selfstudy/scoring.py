"""The most likely tokens at given places of texts that are already written, many texts at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.schema import TopLogprobs
from cartridges_jax.models import Decoder, Model, ModelConfig, lm_logits
from cartridges_jax.sampling.buckets import round_up
from cartridges_jax.sampling.prefill import check_token_ids

# Tokens read per dispatch; bounds the attention scores at N x TOKENS x (P + T).
_TOKENS = 1024
# Places whose logits exist at the same time; bounds them at PLACES x V.
_PLACES = 256


@functools.partial(jax.jit, static_argnames=("config",))
def _read(
    config: ModelConfig,
    params: Any,
    prefix: KVPrefix | None,
    tokens: Int[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"],
) -> Float[Array, "B T D"]:
    """Hidden states of rows, each a text of its own after the prefix."""
    return Decoder(config).apply({"params": params}, tokens, None, segment_ids, prefix=prefix)[0]


@functools.partial(jax.jit, static_argnames=("config", "k"))
def _top(
    config: ModelConfig, params: Any, hidden: Float[Array, "B T D"], places: Int[np.ndarray, " M"], k: int
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """Ids and log-probabilities of the tokens after `places`, indices into the B * T hidden states."""
    logits = lm_logits(params, config, hidden.reshape(-1, hidden.shape[-1])[places])
    top, ids = jax.lax.top_k(logits, k)
    return ids, top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def top_logprobs_of(
    model: Model,
    rows: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    prefix: KVPrefix | None,
    k: int,
    *,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[TopLogprobs]:
    """The model's k most likely tokens at the places of `row[begin:end]`, for every row.

    Args:
      rows: token ids, read after `prefix`.
      spans: one (begin, end) per row, with 1 <= begin <= end <= its length.
      prefix: shared by all rows.
      heartbeat: called after every dispatch; what it raises ends the call.

    Returns:
      One per row, of shape (end - begin, k); log-probabilities at temperature 1 over the whole vocabulary.

    Raises:
      UserError: a row that the model cannot read.
    """
    # Tokens after the last place have no effect on it.
    rows = [row[: end - 1] for row, (_, end) in zip(rows, spans, strict=True)]
    for row in rows:
        check_token_ids(model, row, prefix)
    results: dict[int, TopLogprobs] = {}
    for numbers in _batches([len(row) for row in rows]):
        num_tokens = round_up(max(len(rows[i]) for i in numbers), 64)
        # Few shapes to compile for: a batch that is not full is padded with empty rows.
        num_rows = max(_TOKENS // num_tokens, 1)
        tokens = np.zeros((num_rows, num_tokens), np.int32)
        segment_ids = np.zeros_like(tokens)
        for place, i in enumerate(numbers):
            tokens[place, : len(rows[i])] = rows[i]
            segment_ids[place, : len(rows[i])] = 1
        hidden = _read(model.config, model.params, prefix, tokens, segment_ids)
        # The token at index i is predicted at i - 1.
        places = np.concatenate(
            [place * num_tokens + np.arange(spans[i][0] - 1, spans[i][1] - 1) for place, i in enumerate(numbers)]
        )
        ids, logprobs = _top_at(model, hidden, places, k)
        ends = np.cumsum([spans[i][1] - spans[i][0] for i in numbers])
        for i, own_ids, own in zip(numbers, np.split(ids, ends[:-1]), np.split(logprobs, ends[:-1]), strict=True):
            results[i] = TopLogprobs.from_dense(own_ids, own)
        heartbeat()
    return [results[i] for i in range(len(rows))]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows to read together: of similar length, `_TOKENS` of them with padding, at least one row."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first row of a batch is its longest.
        if not batches or (len(batches[-1]) + 1) * round_up(lengths[batches[-1][0]], 64) > _TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _top_at(model: Model, hidden: Array, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and log-probabilities, each [len(places), k]."""
    ids, logprobs = [], []
    for first in range(0, len(places), _PLACES):
        some = places[first : first + _PLACES]
        padded = np.pad(some, (0, round_up(len(some), 64) - len(some))).astype(np.int32)
        top = _top(model.config, model.params, hidden, padded, k)
        for found, part in zip((ids, logprobs), top, strict=True):
            found.append(parallel.fetch(part)[: len(some)])
    if not ids:
        return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
    return np.concatenate(ids), np.concatenate(logprobs)
