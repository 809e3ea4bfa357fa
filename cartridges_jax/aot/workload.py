"""What is compiled: a model and the sizes of the work done with it."""

from __future__ import annotations

import dataclasses
import math

from cartridges_jax.data.packing import rounded_targets
from cartridges_jax.distill.settings import TrainSettings
from cartridges_jax.errors import UserError
from cartridges_jax.models import ModelConfig
from cartridges_jax.sampling.buckets import slot_bucket


@dataclasses.dataclass(frozen=True)
class PodSettings:
    """Where a run is to go, for `launch/aot.py`; a run itself takes what there is.

    Attributes:
      topology: such as "v5e:4x4" or "h100:8"; "" for none in particular.
      decode_rows: conversations that are to decode together; self-study's 128 (`sampling.generate_tokens`) by default.
      context_tokens: the long text that the cartridge stands for; of it a model sees what its context holds.
    """

    topology: str
    decode_rows: int
    context_tokens: int

    def check(self) -> None:
        """Raises UserError for a value that nothing could be compiled for."""
        for name in ("decode_rows", "context_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"pod.{name}={getattr(self, name)}: must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A run that has not begun: a model, a cartridge, and the sizes of the work.

    Attributes:
      model: what the user calls it.
      config: its shapes.
      dtype: "float32" or "bfloat16", what is computed in.
      weights: how matrices are kept if not in `dtype` (see `quantized`).
      num_slots: P.
      front_slots: that self-study decodes behind, a chunk or the whole text, or P if that is more.
      train: rows, lengths and micro-batches of a step.
      prompt_tokens, answer_tokens: of a conversation; the answer's tokens are the targets.
      top_logprobs: k, teacher entries of a target.
      mesh: the devices' axes, as in a run's config.
      pod: the topology, and the rows that decode.
    """

    model: str
    config: ModelConfig
    dtype: str
    weights: str
    num_slots: int
    front_slots: int
    train: TrainSettings
    prompt_tokens: int
    answer_tokens: int
    top_logprobs: int
    mesh: str
    pod: PodSettings

    @property
    def row_lengths(self) -> list[int]:
        """The conversations of a packed row: as many as fit, and part of another."""
        whole, rest = divmod(self.train.row_tokens, self.conversation_tokens)
        return [self.conversation_tokens] * whole + [rest] * bool(rest)

    @property
    def conversation_tokens(self) -> int:
        return min(self.prompt_tokens + self.answer_tokens, self.train.row_tokens)

    @property
    def targets_per_row(self) -> int:
        """Rounded up, as a packing plan does."""
        share = self.answer_tokens / (self.prompt_tokens + self.answer_tokens)
        return rounded_targets(math.ceil(self.train.row_tokens * share))

    @property
    def context_tokens(self) -> int:
        """Of the long text, as far as the model can see."""
        return min(self.pod.context_tokens, self.config.context_length)

    @property
    def icl_tokens(self) -> int:
        """Of the long text that evaluation reads whole: what leaves room for a conversation."""
        return min(self.context_tokens, self.config.context_length - self.own_slots)

    @property
    def own_slots(self) -> int:
        """Of a conversation's own cache."""
        return slot_bucket(self.prompt_tokens + self.answer_tokens)
