"""A run's programs before there are devices: a model and the sizes of the work done with it."""

from __future__ import annotations

import dataclasses
import math

from cartridges_jax.data.packing import rounded_targets
from cartridges_jax.distill.settings import TrainSettings
from cartridges_jax.models import ModelConfig
from cartridges_jax.sampling.buckets import slot_bucket


@dataclasses.dataclass(frozen=True)
class Workload:
    """The model, the cartridge and the sizes of a run, from which its programs are compiled.

    Attributes:
      model: its name in the config.
      config: its shapes.
      dtype: "float32" or "bfloat16", of the computation.
      weights: how matrices are stored if not in `dtype` (see `quantized`).
      num_slots: P.
      prefix_slots: slots of the prefix that self-study decodes after: a chunk or the whole text, or P if that is more.
      train: rows, lengths and micro-batches of a step.
      prompt_tokens, answer_tokens: lengths in a conversation; the answer's tokens are the targets.
      top_logprobs: k, teacher entries of a target.
      mesh: the devices' axes, as in a run's config.
      topology: the devices, such as "v5e:4x4" or "h100:8".
      decode_rows: conversations that decode together.
      context_tokens: length of the text that the cartridge replaces; a model sees as much as its context holds.
    """

    model: str
    config: ModelConfig
    dtype: str
    weights: str
    num_slots: int
    prefix_slots: int
    train: TrainSettings
    prompt_tokens: int
    answer_tokens: int
    top_logprobs: int
    mesh: str
    topology: str
    decode_rows: int
    context_tokens: int

    @property
    def row_lengths(self) -> list[int]:
        """The lengths of the conversations in a packed row: as many as fit, and part of another."""
        whole, rest = divmod(self.train.row_tokens, self.conversation_tokens)
        return [self.conversation_tokens] * whole + [rest] * bool(rest)

    @property
    def conversation_tokens(self) -> int:
        """The length of a conversation, cut to a row."""
        return min(self.prompt_tokens + self.answer_tokens, self.train.row_tokens)

    @property
    def targets_per_row(self) -> int:
        """The targets of a row, rounded up as a packing plan does."""
        share = self.answer_tokens / (self.prompt_tokens + self.answer_tokens)
        return rounded_targets(math.ceil(self.train.row_tokens * share))

    @property
    def visible_tokens(self) -> int:
        """The part of the long text that fits the model's context."""
        return min(self.context_tokens, self.config.context_length)

    @property
    def whole_text_tokens(self) -> int:
        """The part of the long text that evaluation reads: it leaves room for a conversation."""
        return min(self.visible_tokens, self.config.context_length - self.own_slots)

    @property
    def own_slots(self) -> int:
        """The slots of a conversation's own cache."""
        return slot_bucket(self.prompt_tokens + self.answer_tokens)
