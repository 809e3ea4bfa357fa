"""Batched generation after one shared prefix: one `Generation` per prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Model
from cartridges_jax.sampling.engine import Engine
from cartridges_jax.sampling.request import Generation, Request
from cartridges_jax.sampling.select import GREEDY, Sampling


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
    """Continues every prompt after the same prefix.

    Args:
      prompts: token ids, each at least one; read as they are.
      prefix: shared by all prompts.
      max_tokens: the most new tokens per prompt.
      stop_ids: tokens that end an answer; the chat template's by default.
      seed: with the prompt's index it determines the prompt's draws.
      top_logprobs: how many of the most likely tokens to return per step.
      batch_size: rows decoded together.
      on_progress: called after every dispatch, with the number of prompts it finished;
        an exception from it ends the call.

    Returns:
      One `Generation` per prompt, in order.

    Raises:
      UserError: a prompt that the model cannot read, or continue by that many tokens.
    """
    stops = tuple(model.chat.stop_ids if stop_ids is None else stop_ids)
    engine = Engine(model, num_slots=batch_size)
    handle = None if prefix is None else engine.add_prefix(prefix)
    requests = [
        Request(prompt, max_tokens, handle, sampling, stops, seed=seed, stream=index, top_logprobs=top_logprobs)
        for index, prompt in enumerate(prompts)
    ]
    return engine.run(requests, on_progress)
