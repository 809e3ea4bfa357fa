"""The training run: steps, held-out loss, checkpoints, and the ways a run can end.

It knows neither tasks nor texts: examples and a starting prefix come in, a prefix goes out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.examples import Example
from cartridges_jax.data.packing import PackingPlan, TrainBatch, plan_packing
from cartridges_jax.data.prefetch import prefetch
from cartridges_jax.distill.checkpoints import SharedCheckpoints
from cartridges_jax.distill.learner import Learner, make_learner
from cartridges_jax.distill.settings import TrainSettings, make_optimizer
from cartridges_jax.distill.sharding import Step, on_mesh, placed_batch, state_shardings, step_on_mesh
from cartridges_jax.distill.step import TrainState, eval_step, init_state, train_step
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.parallel import ALONE, Job


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
      prefix: the trained cartridge, as the learner exports it.
      history: {"train": [{"step", "loss"}], "heldout": [{"step", "loss"}]}, nats a token; the loss
        of a step that was not finite is None.
      refused: steps refused for a loss or gradient that was not finite.
      packing_efficiency: real tokens over all tokens of the packed rows.
      epochs: passes over the examples, on average.
    """

    prefix: KVPrefix
    history: dict[str, list[dict[str, float | None]]]
    refused: int
    packing_efficiency: float
    epochs: float


class StopRequested(Exception):
    """The run was asked to stop; its state is saved, and the same call resumes from it."""


def heldout_loss(model: Model, learner: Learner, frozen: Any, trainable: Any, plan: PackingPlan, tail: str) -> float:
    """Mean divergence a token over all held-out examples, in nats.

    Args:
      model: with the plan's mesh.
      learner: joins `frozen` and `trainable`.
      frozen, trainable: on the model's devices.
      plan: of the held-out examples, each once.
      tail: see `loss`.
    """
    total, count = 0.0, 0.0
    for step in range(len(plan.steps)):
        batch = placed_batch(plan, step, model.mesh)
        loss, targets = eval_step(model.config, learner, model.params, frozen, trainable, batch, tail=tail)
        total, count = total + float(loss), count + float(targets)
    return total / count


def _step_for(
    model: Model,
    optimizer: optax.GradientTransformation,
    learner: Learner,
    frozen: Any,
    state: TrainState,
    settings: TrainSettings,
) -> Step:
    """The train step with its static arguments bound."""
    static, options = (model.config, optimizer, learner), {"tail": settings.tail, "remat": settings.remat}
    if model.mesh is None:
        return functools.partial(train_step, *static, **options)
    return step_on_mesh(*static, model.mesh, model.params, frozen, state, **options)


def train(
    model: Model,
    initial: KVPrefix,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    settings: TrainSettings,
    directory: Path,
    *,
    learner: Learner | None = None,
    seed: int,
    job: Job = ALONE,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains a cartridge, from the newest checkpoint in `directory` if there is one.

    Args:
      model: frozen; on a mesh of all the job's devices, if it has one.
      initial: P slots to start from, in any float dtype.
      examples: to train on.
      heldout: for the held-out loss; may be empty.
      settings: with a number of steps.
      directory: of this run's checkpoints, and no other run's.
      learner: what is trained; None is that of `settings.learner`, with one frozen slot.
      seed: of the data order.
      job: the processes that train together.
      on_step: called with (steps taken, that step's loss); first with the steps of
        earlier attempts and None.
      should_stop: polled after every step; must return the same value in every process.

    Returns:
      The same result, on the same mesh bit for bit, however often the run was interrupted.

    Raises:
      StopRequested: `should_stop` returned True; the state is saved.
      UserError: bad settings or examples, or too many refused steps in a row; the last
        good state is saved.
      ValueError: `settings.steps` is 0 (auto), which the caller must resolve.
    """
    settings.check()
    if settings.steps == 0:
        raise ValueError("settings.steps=0 means auto: replace it by a number of steps before training")
    if learner is None:
        learner = make_learner(settings.learner, num_frozen=1)
    training = _Training(model, learner, initial, examples, heldout, settings, directory, seed, job, on_step)
    with contextlib.closing(training.checkpoints):
        training.run(should_stop)
    return training.result()


class _Training:
    """One run: its data, its state and its history."""

    def __init__(
        self,
        model: Model,
        learner: Learner,
        initial: KVPrefix,
        examples: Sequence[Example],
        heldout: Sequence[Example],
        settings: TrainSettings,
        directory: Path,
        seed: int,
        job: Job,
        on_step: Callable[[int, float | None], None],
    ):
        self._model, self._learner, self._settings = model, learner, settings
        self._directory, self._on_step = directory, on_step
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
        optimizer = make_optimizer(settings)
        frozen, trainable = learner.init(model, parallel.place_prefix(initial, mesh))
        self._frozen = on_mesh(frozen, mesh)
        self._mask = parallel.replicate(learner.mask(frozen, trainable), mesh)
        shardings = None if mesh is None else state_shardings(mesh, optimizer, learner, trainable)
        self._state = init_state(trainable, optimizer, shardings)
        self._history: dict[str, list[dict[str, float | None]]] = {"train": [], "heldout": []}
        self.checkpoints = SharedCheckpoints(directory, settings.keep_checkpoints, job)
        if self.checkpoints.latest is not None:
            self._state, extra = self.checkpoints.restore(self._state)
            self._history = extra["history"]
        self._take_step = _step_for(model, optimizer, learner, self._frozen, self._state, settings)

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Takes the remaining steps; raises as `train` does."""
        settings, done = self._settings, int(self._state.step)
        self._on_step(done, None)
        self._end_if_refused(int(self._state.refused_in_a_row), done)
        if done == 0:
            self._measure_heldout(0)
        with self._batches(range(done, settings.steps)) as batches:
            pending = None
            for step, batch in enumerate(batches, start=done + 1):
                self._state, metrics = self._take_step(self._model.params, self._frozen, self._mask, self._state, batch)
                # Fetched one step late: the device computes this step while the host reads the last.
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
        """The result of a run that took all its steps."""
        return TrainResult(
            prefix=self._learner.export(_on_host(self._frozen), _on_host(self._state.trainable)),
            history=self._history,
            refused=int(self._state.refused),
            packing_efficiency=self._plan.efficiency,
            epochs=self._plan.epochs,
        )

    def _batches(self, steps: range) -> contextlib.closing[Generator[TrainBatch, None, None]]:
        """Batches of the given steps on the devices, packed and copied while earlier steps run."""
        return contextlib.closing(prefetch(lambda step: placed_batch(self._plan, step, self._model.mesh), steps))

    def _measure_heldout(self, step: int) -> None:
        if self._heldout_plan is not None:
            model, trainable, tail = self._model, self._state.trainable, self._settings.tail
            loss = heldout_loss(model, self._learner, self._frozen, trainable, self._heldout_plan, tail)
            self._history["heldout"].append({"step": step, "loss": loss})

    def _record(self, step: int, metrics: dict[str, Array]) -> int:
        """Records the loss of a step; returns the number of refused steps in a row."""
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


def _on_host(tree: Any) -> Any:
    """Arrays of any sharding as NumPy arrays."""
    return jax.tree.map(lambda leaf: parallel.fetch(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf), tree)
