"""Batched generation behind one shared prefix: prefill, then jitted decode steps.

Shapes are bucketed (rows to a power of two or a multiple of 32, prompts and slots to
multiples of 16), so
that few programs are compiled. Several decode steps run per dispatch; the host looks at
what has ended only between dispatches.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Cache, Decoder, Model, ModelConfig, empty_cache, lm_logits
from cartridges_jax.sampling.prefill import check_token_ids, read_tokens, round_up
from cartridges_jax.sampling.select import GREEDY, Sampling, select_tokens

STEPS_PER_DISPATCH = 8


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt was answered with.

    Attributes:
      token_ids: generated ids; the stop token, if one came, is the last.
      stop_reason: "stop" (a stop token came) or "length" (max_tokens reached).
      top_ids: [len(token_ids), k] int32, the k most likely tokens of every step, or
        None when none were asked for.
      top_logprobs: [len(token_ids), k] float32, their log-probabilities at temperature
        1 over the whole vocabulary.
    """

    token_ids: list[int]
    stop_reason: str
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@flax.struct.dataclass
class DecodeState:
    """A batch between two decode steps.

    Attributes:
      cache: what the rows hold so far.
      logits: [B, V] float32 for each row's next token.
      keys: [B] PRNG keys, constant; step i of a row draws with fold_in(key, i).
      num_generated: scalar int32, steps taken.
      done: [B] bool, a stop token came.
    """

    cache: Cache
    logits: Array
    keys: Array
    num_generated: Array
    done: Array


@functools.partial(jax.jit, static_argnames=("config",))
def _last_logits(config: ModelConfig, params: Any, hidden: Array, lengths: Array) -> Array:
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return lm_logits(params, config, last)


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "top_logprobs", "num_steps"),
    donate_argnames=("state",),
)
def decode_steps(
    config: ModelConfig,
    params: Any,
    prefix: KVPrefix | None,
    state: DecodeState,
    stop_ids: Array,
    *,
    sampling: Sampling,
    top_logprobs: int,
    num_steps: int,
) -> tuple[DecodeState, tuple[Array, Array, Array]]:
    """Takes `num_steps` tokens per row.

    Args:
      stop_ids: [n] int32, tokens that end a row.
      top_logprobs: k.

    Returns:
      The state, and per step: token [num_steps, B] (-1 once a row had ended), ids and
      log-probabilities [num_steps, B, k] of the most likely tokens.
    """
    start = 0 if prefix is None else prefix.next_position

    def step(state: DecodeState, _):
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.num_generated)
        token = select_tokens(state.logits, keys, sampling)
        normaliser = jax.nn.logsumexp(state.logits, axis=-1, keepdims=True)
        top, top_ids = jax.lax.top_k(state.logits, top_logprobs)
        emitted = jnp.where(state.done, -1, token)
        done = state.done | jnp.isin(token, stop_ids)
        hidden, cache, _ = Decoder(config).apply(
            {"params": params},
            token[:, None],
            start + state.cache.lengths[:, None],
            (~done).astype(jnp.int32)[:, None],
            prefix=prefix,
            cache=state.cache,
        )
        state = state.replace(
            cache=cache,
            logits=lm_logits(params, config, hidden[:, 0]),
            num_generated=state.num_generated + 1,
            done=done,
        )
        return state, (emitted, top_ids, top - normaliser)

    return jax.lax.scan(step, state, length=num_steps)


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    prefix: KVPrefix | None = None,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Iterable[int] | None = None,
    seed: int = 0,
    top_logprobs: int = 0,
    batch_size: int = 128,
    on_progress: Callable[[int], None] = lambda finished: None,
) -> list[Generation]:
    """Continues every prompt behind the same prefix.

    Args:
      prompts: token ids, each at least one; read as they are.
      prefix: shared by all prompts.
      max_tokens: at most so many new tokens per prompt.
      stop_ids: tokens that end an answer; the chat template's by default.
      seed: with the prompt's index it determines the prompt's draws.
      top_logprobs: how many of the most likely tokens to return per step.
      batch_size: rows decoded together.
      on_progress: called after every dispatch, with the number of prompts it finished;
        what it raises ends the call.

    Returns:
      One `Generation` per prompt, in order.

    Raises:
      UserError: a prompt that the model cannot read or continue so far.
    """
    for prompt in prompts:
        check_token_ids(model, prompt, prefix, room=max_tokens)
    stop = jnp.asarray(sorted(model.chat.stop_ids if stop_ids is None else stop_ids), jnp.int32)
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    results: dict[int, Generation] = {}
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        batch = _generate_batch(
            model, [prompts[i] for i in indices], indices, prefix, max_tokens, sampling, stop, seed, top_logprobs,
            on_progress,
        )
        results.update(zip(indices, batch))
    return [results[i] for i in range(len(prompts))]


@jax.jit
def _take_rows(state: DecodeState, rows: Array) -> DecodeState:
    """The batch of these rows only."""
    cache = Cache(
        keys=jnp.take(state.cache.keys, rows, axis=1),
        values=jnp.take(state.cache.values, rows, axis=1),
        lengths=state.cache.lengths[rows],
    )
    return state.replace(cache=cache, logits=state.logits[rows], keys=state.keys[rows], done=state.done[rows])


def _row_bucket(num_rows: int) -> int:
    return round_up(num_rows, 32) if num_rows > 32 else 1 << (num_rows - 1).bit_length()


def _generate_batch(
    model: Model,
    prompts: list[Sequence[int]],
    indices: list[int],
    prefix: KVPrefix | None,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: Array,
    seed: int,
    top_logprobs: int,
    on_progress: Callable[[int], None],
) -> list[Generation]:
    num_rows = _row_bucket(len(prompts))
    num_tokens = round_up(max(map(len, prompts)), 16)
    tokens = np.zeros((num_rows, num_tokens), np.int32)
    lengths = np.ones((num_rows,), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    segment_ids = (np.arange(num_tokens) < lengths[:, None]).astype(np.int32)

    cache = empty_cache(model.config, num_rows, round_up(num_tokens + max_tokens, 16), model.dtype)
    hidden, cache = read_tokens(model.config, model.params, prefix, cache, tokens, segment_ids)
    row_ids = np.zeros((num_rows,), np.uint32)
    row_ids[: len(indices)] = indices
    state = DecodeState(
        cache=cache,
        logits=_last_logits(model.config, model.params, hidden, lengths),
        keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_ids),
        num_generated=jnp.int32(0),
        done=jnp.arange(num_rows) >= len(prompts),
    )
    shape = (round_up(max_tokens, STEPS_PER_DISPATCH), num_rows)
    emitted = np.full(shape, -1, np.int32)
    top_ids = np.zeros((*shape, top_logprobs), np.int32)
    top = np.zeros((*shape, top_logprobs), np.float32)
    prompt_of = np.arange(num_rows)
    finished = 0
    for begin in range(0, max_tokens, STEPS_PER_DISPATCH):
        state, outputs = decode_steps(
            model.config, model.params, prefix, state, stop_ids,
            sampling=sampling, top_logprobs=top_logprobs, num_steps=STEPS_PER_DISPATCH,
        )
        for collected, output in zip((emitted, top_ids, top), outputs):
            collected[begin : begin + STEPS_PER_DISPATCH, prompt_of] = np.asarray(output)
        active = np.flatnonzero(~np.asarray(state.done))
        last = not len(active) or begin + STEPS_PER_DISPATCH >= max_tokens
        ended = len(prompts) if last else len(prompts) - len(active)
        on_progress(ended - finished)
        finished = ended
        if not len(active):
            break
        if 2 * len(active) <= len(prompt_of):
            # Rows that have ended cost as much as others: go on with half of them.
            inactive = np.flatnonzero(np.asarray(state.done))
            kept = np.concatenate([active, inactive])[: len(prompt_of) // 2]
            state, prompt_of = _take_rows(state, kept), prompt_of[kept]

    stops = set(np.asarray(stop_ids).tolist())
    generations = []
    for row in range(len(prompts)):
        count = int(np.sum(emitted[:max_tokens, row] >= 0))
        ids = emitted[:count, row].tolist()
        generations.append(
            Generation(
                token_ids=ids,
                stop_reason="stop" if ids and ids[-1] in stops else "length",
                top_ids=top_ids[:count, row] if top_logprobs else None,
                top_logprobs=top[:count, row] if top_logprobs else None,
            )
        )
    return generations
