"""The training run: steps, held-out loss, checkpoints, and the ways a run can end.

Knows nothing of tasks or files of text: it is given examples and gives back a prefix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax import Array

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.packing import Example, PackingPlan, TrainBatch, check_rows, plan_packing
from cartridges_jax.data.prefetch import prefetch
from cartridges_jax.distill.checkpoints import SharedCheckpoints
from cartridges_jax.distill.loss import TAILS
from cartridges_jax.distill.sharding import Step, placed_batch, state_shardings, step_on_mesh
from cartridges_jax.distill.step import (
    TrainState,
    cartridge_trainable,
    combine_cartridge,
    eval_step,
    init_state,
    learning_mask,
    train_step,
)
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.parallel import ALONE, Job

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How a cartridge is trained.

    Attributes:
      steps: optimizer steps.
      learning_rate: Adam's, after the warm-up (paper: 2e-2 at about 65,000 tokens a step).
      schedule: "constant" (paper) or "cosine", down to `final_fraction` of the rate.
      warmup_steps: steps of linear warm-up.
      final_fraction: of the learning rate, at the end of the cosine.
      clip_norm: global gradient norm above which a gradient is scaled down; 0 is off.
      rows_per_step, row_tokens: packed rows in a step and their length in tokens.
      micro_batches: the step's rows are computed in so many parts, to save memory.
      targets: "assistant" trains on B's tokens, "all" also on A's where stored.
      tail: what becomes of the probability outside the stored top-k (see `loss`).
      remat: recompute layers in the backward pass, to save memory.
      eval_every: steps between held-out losses.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many are kept.
      max_refused_in_a_row: so many refused steps in a row end the run.
    """

    steps: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    final_fraction: float
    clip_norm: float
    rows_per_step: int
    row_tokens: int
    micro_batches: int
    targets: str
    tail: str
    remat: bool
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    max_refused_in_a_row: int

    def check(self) -> None:
        """Raises UserError for a value that no run could use."""
        for name in (
            "steps",
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
        for name in ("warmup_steps", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}={getattr(self, name)}: must be 0 or more")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"train.learning_rate={self.learning_rate}: must be above 0")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"train.final_fraction={self.final_fraction}: must be between 0 and 1")
        for name, choices in (("schedule", SCHEDULES), ("tail", TAILS), ("targets", ("assistant", "all"))):
            if getattr(self, name) not in choices:
                raise UserError(f"train.{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        check_rows(self.rows_per_step, self.micro_batches, row_parts=1)


@functools.cache
def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """Adam with the settings' schedule and clipping (paper appendix: Adam).

    Equal settings give the same object: the compiled step is looked up by it.
    """
    warmup = min(settings.warmup_steps, settings.steps - 1)
    if settings.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else settings.learning_rate,
            peak_value=settings.learning_rate,
            warmup_steps=warmup,
            decay_steps=settings.steps,
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


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
      prefix: the trained cartridge, float32.
      history: {"train": [{"step", "loss"}], "heldout": [{"step", "loss"}]}, nats a token.
      refused: steps refused for a loss or gradient that was not finite.
      packing_efficiency: real tokens over all tokens of the packed rows.
      epochs: passes over the examples.
    """

    prefix: KVPrefix
    history: dict[str, list[dict[str, float]]]
    refused: int
    packing_efficiency: float
    epochs: float


class StopRequested(Exception):
    """The run was asked to stop; its state is saved and the same call goes on from it."""


def heldout_loss(model: Model, prefix: KVPrefix, trainable, plan: PackingPlan, tail: str) -> float:
    """Mean divergence a token over all held-out examples, in nats."""
    total, count = 0.0, 0.0
    for step in range(len(plan.steps)):
        loss, targets = eval_step(
            model.config,
            combine_cartridge,
            model.params,
            prefix,
            trainable,
            placed_batch(plan, step, model.mesh),
            tail=tail,
        )
        total, count = total + float(loss), count + float(targets)
    return total / count


def _step_for(
    model: Model, optimizer: optax.GradientTransformation, initial: KVPrefix, state: TrainState, settings: TrainSettings
) -> Step:
    """The step behind its static arguments."""
    static, options = (model.config, optimizer, combine_cartridge), {"tail": settings.tail, "remat": settings.remat}
    if model.mesh is None:
        return functools.partial(train_step, *static, **options)
    return step_on_mesh(*static, model.mesh, model.params, initial, state, **options)


def train(
    model: Model,
    initial: KVPrefix,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    settings: TrainSettings,
    directory: Path,
    *,
    num_frozen: int,
    seed: int,
    job: Job = ALONE,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains a cartridge, from the newest checkpoint in `directory` if there is one.

    Args:
      initial: P slots to start from, in any float dtype.
      examples: what is learned from.
      heldout: what the held-out loss is measured on; may be empty.
      directory: where checkpoints of this run, and no other's, are kept.
      num_frozen: first slots that never change (paper: the attention sink).
      seed: of the data order.
      job: the processes that train together; the model lies on a mesh of all their devices.
      on_step: called with (steps taken, that step's loss); first with the steps of
        earlier attempts and None.
      should_stop: asked after every step; says the same in every process.

    Returns:
      The same result, on the same mesh bit for bit, however often the run was interrupted.

    Raises:
      StopRequested: `should_stop` said so; the state is saved.
      UserError: bad settings or examples, or too many refused steps in a row; the last
        good state is saved.
    """
    settings.check()
    training = _Training(model, initial, examples, heldout, settings, directory, num_frozen, seed, job, on_step)
    with contextlib.closing(training.checkpoints):
        training.go_on(should_stop)
    return training.result()


class _Training:
    """One run: what it learns from, where it stands, and what it has seen."""

    def __init__(
        self,
        model: Model,
        initial: KVPrefix,
        examples: Sequence[Example],
        heldout: Sequence[Example],
        settings: TrainSettings,
        directory: Path,
        num_frozen: int,
        seed: int,
        job: Job,
        on_step: Callable[[int, float | None], None],
    ):
        self._model, self._settings, self._directory, self._on_step = model, settings, directory, on_step
        mesh = model.mesh
        rows = {"row_tokens": settings.row_tokens, "row_parts": parallel.row_parts(mesh)}
        self._plan = plan_packing(
            examples,
            num_steps=settings.steps,
            rows_per_step=settings.rows_per_step,
            micro_batches=settings.micro_batches,
            seed=seed,
            **rows,
        )
        self._heldout_plan = None
        if heldout:
            self._heldout_plan = plan_packing(
                heldout,
                num_steps=None,
                rows_per_step=settings.rows_per_step // settings.micro_batches,
                micro_batches=1,
                **rows,
            )
        self._initial = parallel.place_prefix(initial, mesh)
        self._mask = parallel.replicate(learning_mask(initial.num_slots, num_frozen)[:, None], mesh)
        optimizer, trainable = make_optimizer(settings), cartridge_trainable(self._initial)
        shardings = None if mesh is None else state_shardings(mesh, optimizer, trainable)
        self._state = init_state(trainable, optimizer, shardings)
        self._history: dict[str, list[dict[str, float]]] = {"train": [], "heldout": []}
        self.checkpoints = SharedCheckpoints(directory, settings.keep_checkpoints, job)
        if self.checkpoints.latest is not None:
            self._state, extra = self.checkpoints.restore(self._state)
            self._history = extra["history"]
        self._take_step = _step_for(model, optimizer, self._initial, self._state, settings)

    def go_on(self, should_stop: Callable[[], bool]) -> None:
        """Takes the steps that are left; raises as `train` does."""
        settings, done = self._settings, int(self._state.step)
        self._on_step(done, None)
        self._end_if_refused(int(self._state.refused_in_a_row), done)
        if done == 0:
            self._measure_heldout(0)
        with self._batches(range(done, settings.steps)) as batches:
            pending = None
            for step, batch in enumerate(batches, start=done + 1):
                self._state, metrics = self._take_step(
                    self._model.params, self._initial, self._mask, self._state, batch
                )
                # Fetched one step late: the device works on this step while the host reads the last.
                refused_in_a_row = self._record(*pending) if pending else 0
                pending = (step, metrics)
                last, stopping = step == settings.steps, should_stop()
                saving = last or stopping or step % settings.checkpoint_every == 0
                if saving or refused_in_a_row >= settings.max_refused_in_a_row:
                    refused_in_a_row = self._record(*pending)
                    pending = None
                if last or step % settings.eval_every == 0:
                    self._measure_heldout(step)
                if saving or refused_in_a_row >= settings.max_refused_in_a_row:
                    self.checkpoints.save(step, self._state, {"history": self._history})
                self._end_if_refused(refused_in_a_row, step)
                if stopping and not last:
                    self.checkpoints.complete()
                    raise StopRequested

    def result(self) -> TrainResult:
        """Of a run that has come to its end."""
        trained = jax.tree.map(parallel.fetch, self._state.trainable)
        return TrainResult(
            prefix=self._initial.replace(keys=jnp.asarray(trained["keys"]), values=jnp.asarray(trained["values"])),
            history=self._history,
            refused=int(self._state.refused),
            packing_efficiency=self._plan.efficiency,
            epochs=self._plan.epochs,
        )

    def _batches(self, steps: range) -> contextlib.closing[Iterator[TrainBatch]]:
        """The batches of the given steps on the devices, packed and copied while earlier steps run."""
        return contextlib.closing(prefetch(lambda step: placed_batch(self._plan, step, self._model.mesh), steps))

    def _measure_heldout(self, step: int) -> None:
        if self._heldout_plan is not None:
            loss = heldout_loss(
                self._model, self._initial, self._state.trainable, self._heldout_plan, self._settings.tail
            )
            self._history["heldout"].append({"step": step, "loss": loss})

    def _record(self, step: int, metrics: dict[str, Array]) -> int:
        """Notes the loss of a step; returns how many steps in a row were refused."""
        loss = float(metrics["loss"])
        self._history["train"].append({"step": step, "loss": loss if math.isfinite(loss) else None})
        self._on_step(step, loss)
        return int(metrics["refused_in_a_row"])

    def _end_if_refused(self, refused_in_a_row: int, step: int) -> None:
        settings = self._settings
        if refused_in_a_row >= settings.max_refused_in_a_row:
            self.checkpoints.complete()
            raise UserError(
                f"training stopped at step {step}: {refused_in_a_row} steps in a row had a loss or gradient "
                f"that was not finite; lower train.learning_rate={settings.learning_rate} "
                f"(the last good state is in {self._directory})"
            )
