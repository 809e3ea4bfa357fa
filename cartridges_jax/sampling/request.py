"""An engine's requests, and the events and results that it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cartridges_jax.sampling.select import GREEDY, Sampling


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

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


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixHandle:
    """A prefix that an engine holds on the device.

    Attributes:
      num_slots: P.
      next_position: the position of the first token after it.
    """

    num_slots: int
    next_position: int


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
      prompt: token ids, at least one; read as they are.
      max_tokens: the most new tokens, at least one.
      prefix: precedes the prompt; held by the same engine.
      sampling: how tokens are drawn.
      stop_ids: tokens that end the answer; none by default.
      seed, stream: together they determine the draws; give requests of one seed different
        streams to draw differently.
      top_logprobs: how many of the most likely tokens to return per token.
    """

    prompt: Sequence[int]
    max_tokens: int
    prefix: PrefixHandle | None = None
    sampling: Sampling = GREEDY
    stop_ids: Sequence[int] = ()
    seed: int = 0
    stream: int = 0
    top_logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """The progress of a request since the last step.

    Attributes:
      request_id: as `submit` returned it.
      token_ids: n new tokens.
      stop_reason: "" while the request continues, else as in `Generation`.
      top_ids, top_logprobs: [n, k] of the new tokens, None when none were asked for.
    """

    request_id: int
    token_ids: list[int]
    stop_reason: str = ""
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class Live:
    """A request on its way through an engine.

    Attributes:
      request_id, request: as submitted.
      stops: its stop ids.
      num_generated: tokens that the host has seen.
      in_flight: steps that were dispatched and not yet collected.
      over: ended or cancelled; outputs still in flight are dropped.
    """

    request_id: int
    request: Request
    stops: frozenset[int]
    num_generated: int = 0
    in_flight: int = 0
    over: bool = False

    def slots_for(self, steps: int) -> int:
        """The most slots that it needs in its own cache after that many more steps."""
        ahead = min(self.num_generated + self.in_flight + steps, self.request.max_tokens)
        return len(self.request.prompt) + ahead

    def take(self, token_ids: list[int]) -> str:
        """Counts new tokens; returns the stop reason, "" if the request continues."""
        self.num_generated += len(token_ids)
        if token_ids and token_ids[-1] in self.stops:
            return "stop"
        return "length" if self.num_generated >= self.request.max_tokens else ""
