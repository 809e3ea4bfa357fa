"""Teacher-forced scores: likelihoods and divergences on given answers.

Hidden states are kept instead of logits (D floats a token instead of V); logits are made
in blocks where two conditions are compared.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Decoder, Model, ModelConfig, lm_logits
from cartridges_jax.sampling.prefill import check_token_ids, round_up

_BATCH = 16
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Scored:
    """A prompt and an answer whose tokens are scored."""

    prompt_ids: list[int]
    answer_ids: list[int]


@functools.partial(jax.jit, static_argnames=("config",))
def _hidden(config: ModelConfig, params: Any, prefix: KVPrefix | None, tokens: Array, segment_ids: Array) -> Array:
    start = 0 if prefix is None else prefix.next_position
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    return Decoder(config).apply({"params": params}, tokens, positions, segment_ids, prefix=prefix)[0]


def answer_hidden(
    model: Model,
    prefix: KVPrefix | None,
    items: Sequence[Scored],
    *,
    on_progress: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Final hidden states at the positions that predict the answers' tokens.

    Returns:
      [sum of the answers' lengths, D] in the order of the items, in the model's dtype.

    Raises:
      UserError: an item that does not fit the model's context.
    """
    for item in items:
        check_token_ids(model, item.prompt_ids + item.answer_ids, prefix)
    found: dict[int, np.ndarray] = {}
    order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt_ids) + len(items[i].answer_ids), i))
    for begin in range(0, len(order), _BATCH):
        indices = order[begin : begin + _BATCH]
        sequences = [items[i].prompt_ids + items[i].answer_ids for i in indices]
        tokens = np.zeros((_BATCH, round_up(max(map(len, sequences)), 32)), np.int32)
        segment_ids = np.zeros_like(tokens)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
            segment_ids[row, : len(sequence)] = 1
        hidden = np.asarray(_hidden(model.config, model.params, prefix, tokens, segment_ids))
        for row, index in enumerate(indices):
            first = len(items[index].prompt_ids) - 1
            found[index] = hidden[row, first : first + len(items[index].answer_ids)]
        on_progress(len(indices))
    return np.concatenate([found[i] for i in range(len(items))])


@functools.partial(jax.jit, static_argnames=("config",))
def _block_nll(config: ModelConfig, params: Any, hidden: Array, targets: Array) -> Array:
    logprobs = jax.nn.log_softmax(lm_logits(params, config, hidden))
    return -jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("config",))
def _block_kl(config: ModelConfig, params: Any, teacher: Array, student: Array) -> Array:
    p = jax.nn.log_softmax(lm_logits(params, config, teacher))
    q = jax.nn.log_softmax(lm_logits(params, config, student))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _in_blocks(function, *arrays: np.ndarray) -> np.ndarray:
    count = len(arrays[0])
    values = []
    for begin in range(0, count, _BLOCK):
        parts = [array[begin : begin + _BLOCK] for array in arrays]
        padded = [np.pad(part, [(0, _BLOCK - len(part))] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        values.append(np.asarray(function(*padded))[: len(parts[0])])
    return np.concatenate(values)


def token_nll(model: Model, hidden: np.ndarray, items: Sequence[Scored]) -> np.ndarray:
    """Negative log-likelihood of every answer token, [sum of lengths] in nats.

    Args:
      hidden: of the same items, from `answer_hidden`.
    """
    targets = np.concatenate([np.asarray(item.answer_ids, np.int32) for item in items])
    return _in_blocks(functools.partial(_block_nll, model.config, model.params), hidden, targets)


def token_kl(model: Model, teacher_hidden: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """KL(teacher || condition) over the whole vocabulary at every token, [n] in nats."""
    return _in_blocks(functools.partial(_block_kl, model.config, model.params), teacher_hidden, hidden)
