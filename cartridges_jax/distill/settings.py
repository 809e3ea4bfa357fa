"""The settings of a training run, and the optimizer that they describe."""

from __future__ import annotations

import dataclasses
import functools
import math

import optax

from cartridges_jax.data.examples import TARGETS
from cartridges_jax.data.packing import check_rows
from cartridges_jax.distill.learner import check_learner
from cartridges_jax.distill.loss import TAILS
from cartridges_jax.errors import UserError

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run; the defaults suit a small model on a CPU.

    Attributes:
      learner: name of what is trained, one of `learner.LEARNERS`.
      steps: optimizer steps; 0 means "auto": `epochs` passes over the conversations that there are.
      epochs: passes over the conversations, where `steps` is auto.
      learning_rate: Adam's, after the warm-up (paper: 2e-2 at about 65,000 tokens a step).
      schedule: "constant" (paper) or "cosine", down to `final_fraction` of the rate.
      warmup_steps: steps of linear warm-up.
      final_fraction: of the learning rate, at the end of the cosine.
      clip_norm: global gradient norm above which a gradient is scaled down; 0 is off.
      rows_per_step, row_tokens: packed rows in a step and their length in tokens.
      micro_batches: number of parts in which the step's rows are computed, to save memory.
      targets: "assistant" trains on B's tokens, "all" also on A's where stored.
      tail: treatment of the probability outside the stored top-k (see `loss`).
      remat: recompute layers in the backward pass, to save memory.
      eval_every: steps between held-out losses.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: number of checkpoints that stay on disk.
      max_refused_in_a_row: consecutive refused steps that end the run.
    """

    learner: str = "cartridge"
    steps: int = 0
    epochs: float = 5.5
    learning_rate: float = 4e-2
    schedule: str = "cosine"
    warmup_steps: int = 10
    final_fraction: float = 0.05
    clip_norm: float = 1.0
    rows_per_step: int = 4
    row_tokens: int = 128
    micro_batches: int = 1
    targets: str = "assistant"
    tail: str = "class"
    remat: bool = False
    eval_every: int = 40
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    max_refused_in_a_row: int = 5

    def check(self) -> None:
        """Raises UserError for a value that no run could use."""
        check_learner(self.learner)
        for name in (
            "rows_per_step",
            "row_tokens",
            "micro_batches",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_refused_in_a_row",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)}: must be 1 or more")
        if self.steps < 0:
            raise UserError(f"train.steps={self.steps}: must be 1 or more, or 0 for auto")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise UserError(f"train.epochs={self.epochs}: must be above 0")
        for name in ("warmup_steps", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}={getattr(self, name)}: must be 0 or more")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"train.learning_rate={self.learning_rate}: must be above 0")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"train.final_fraction={self.final_fraction}: must be between 0 and 1")
        for name, choices in (("schedule", SCHEDULES), ("tail", TAILS), ("targets", TARGETS)):
            if getattr(self, name) not in choices:
                raise UserError(f"train.{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        check_rows(self.rows_per_step, self.micro_batches, row_parts=1)


@functools.cache
def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """Builds Adam with the settings' schedule and clipping (paper appendix: Adam).

    Equal settings return the same object: the compiled step is looked up by it.
    """
    # Ahead-of-time compilation needs no number of steps.
    steps = max(settings.steps, 1)
    warmup = min(settings.warmup_steps, steps - 1)
    if settings.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else settings.learning_rate,
            peak_value=settings.learning_rate,
            warmup_steps=warmup,
            decay_steps=steps,
            end_value=settings.learning_rate * settings.final_fraction,
        )
    else:
        rate = optax.schedules.join_schedules(
            [
                optax.linear_schedule(0.0, settings.learning_rate, max(warmup, 1)),
                optax.constant_schedule(settings.learning_rate),
            ],
            [warmup],
        )
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    return optax.chain(*clip, optax.adam(rate))
