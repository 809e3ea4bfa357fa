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

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.packing import packed_rows
from cartridges_jax.models import Decoder, Model, ModelConfig, lm_logits
from cartridges_jax.sampling.buckets import round_up
from cartridges_jax.sampling.prefill import check_token_ids

# Items are packed into this many rows (more where a mesh has more parts) of this many tokens: one program per prefix,
# hardly any padding.
_ROWS, _ROW_TOKENS = 2, 256
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Scored:
    """A prompt and an answer whose tokens are scored."""

    prompt_ids: list[int]
    answer_ids: list[int]


@functools.partial(jax.jit, static_argnames=("config",))
def _hidden(
    config: ModelConfig, params: Any, prefix: KVPrefix | None, tokens: Array, positions: Array, segment_ids: Array
) -> Array:
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
    sequences = [item.prompt_ids + item.answer_ids for item in items]
    sizes = [len(sequence) for sequence in sequences]
    row_tokens = max(_ROW_TOKENS, round_up(max(sizes), 64))
    rows = list(packed_rows(sizes, row_tokens))
    found: dict[int, np.ndarray] = {}
    num_rows = round_up(_ROWS, parallel.row_parts(model.mesh))
    for begin in range(0, len(rows), num_rows):
        tokens, positions, segment_ids = np.zeros((3, num_rows, row_tokens), np.int32)
        answers: dict[int, tuple[int, slice]] = {}
        for row, members in enumerate(rows[begin : begin + num_rows]):
            at = 0
            for segment, index in enumerate(members, start=1):
                place = slice(at, at + sizes[index])
                tokens[row, place] = sequences[index]
                positions[row, place] = np.arange(sizes[index])
                segment_ids[row, place] = segment
                # The position before a token predicts it.
                answers[index] = row, slice(place.stop - len(items[index].answer_ids) - 1, place.stop - 1)
                at = place.stop
        hidden = parallel.fetch(_hidden(model.config, model.params, prefix, tokens, positions, segment_ids))
        found.update({index: hidden[place] for index, place in answers.items()})
        on_progress(len(answers))
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
        values.append(parallel.fetch(function(*padded))[: len(parts[0])])
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
