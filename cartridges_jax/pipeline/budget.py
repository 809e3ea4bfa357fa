"""A run that fits a given time: `budget_minutes` decides its conversations and its steps.

What is measured corrects the estimates as the run proceeds. Self-study ends with the batch that uses up its share of the
time. Then the conditions of the evaluation that need no cartridge are measured, which also tells how long the cartridge's
own will take, and a trial of the train step tells how many steps fit into what is left. Slots and questions are not cut.

Every decision is stored in the workdir as `plan.json` under the stage that it belongs to. A resumed run follows the
stored decisions; a run with another budget has other stages and makes its own decisions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.corpus.questions import questions_hash
from cartridges_jax.data.schema import Conversation
from cartridges_jax.distill.learner import make_learner
from cartridges_jax.distill.trainer import measure_steps
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import SUBJECT, make_conditions
from cartridges_jax.evaluation.evaluate import Baselines, measure_baselines
from cartridges_jax.parallel import Job
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.distillation import initial_prefix, training_data
from cartridges_jax.pipeline.pacing import (
    COMPILE_SECONDS,
    LEAST_LEARNED,
    LEAST_STEPS,
    Estimate,
    fitting_steps,
    in_words,
    least_minutes,
    study_should_end,
    usable_seconds,
)
from cartridges_jax.pipeline.sizes import (
    auto_conversations,
    auto_steps,
    estimated_seconds,
    expected_messages,
    expected_sizes,
    measured_flops,
)
from cartridges_jax.pipeline.stages.context import RunContext
from cartridges_jax.pipeline.stages.evaluate import make_examples
from cartridges_jax.pipeline.workdir import Stage, Workdir, read_json, write_json

FILE = "plan.json"

# A budget above what auto sizes take raises the questions per sentence to this and the epochs by up to this factor.
_MOST_ASKS, _MOST_EPOCHS = 8.0, 2.0
# Minutes of budget up to which a batch of self-study has at most that many requests: batches are what a study is cut into.
_REQUESTS = ((10.0, 32), (30.0, 64))
# Seconds from the start of the process to that of the run (imports).
_START_SECONDS = 5.0
# Evaluation takes about this share of its estimate, whose answers are all of the greatest length.
_EVALUATION_SHARE = 0.6
# The evaluation of the cartridge takes up to this multiple of the fastest baseline's.
_CARTRIDGE_SHARE = 1.1


def with_budget(auto: RunConfig, corpus: TokenizedCorpus) -> RunConfig:
    """The config of a run with a budget: conversations are the most that it may keep, in batches small enough to stop between.

    Args:
      auto: with auto sizes resolved; returned as it is without a budget.
    """
    if not auto.budget_minutes:
        return auto
    study = auto.study
    most = auto_conversations(len(corpus.sentences), max(study.asks_per_sentence, _MOST_ASKS), auto.heldout)
    requests = next((count for minutes, count in _REQUESTS if auto.budget_minutes <= minutes), study.requests_per_batch)
    study = dataclasses.replace(
        study,
        conversations=max(most, study.conversations),
        requests_per_batch=min(requests, study.requests_per_batch),
    )
    return dataclasses.replace(auto, study=study)


class Budget:
    """The budget of one run, and its plan on disk.

    Attributes:
      minutes: the budget.
      loading: seconds from the start of the process until the study.
      baselines: the part of the evaluation that is measured before training; None in a resumed run.
      baseline_seconds, trial_seconds: time spent on it, and on the trial of the train step.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Workdir,
        job: Job,
        loading: float,
        estimate: Callable[[], Estimate],
        say: Callable[[str], None],
    ):
        """
        Args:
          config: with the sizes of `with_budget`.
          estimate: measures the machine; called at a study's first start only.
        """
        self.minutes, self.loading = config.budget_minutes, loading
        self._config, self._path, self._job = config, workdir.path / FILE, job
        self._estimate, self._say = estimate, say
        self.baselines: Baselines | None = None
        self.baseline_seconds = self.trial_seconds = 0.0

    def study_limits(self, stage: Stage) -> dict[str, Any]:
        """Arguments of `synthesise` that end the study in time, or where it ended before.

        Raises:
          UserError: the budget is too small, or the plan of a finished study is missing.
        """
        entry = self._job.from_first(lambda: self._read().get(stage.key))
        if entry is None:
            if stage.done:
                raise UserError(
                    f"{self._path} lacks the plan of {stage.directory}: restore it, or delete that directory to study again"
                )
            entry = self._job.from_first(self._new_entry)
            self._refuse_if_too_small(entry)
            self._job.from_first(lambda: self._write(stage.key, entry))
        if "batches" in entry:
            return {"most_batches": entry["batches"]}
        return {} if stage.done else {"should_end": self._ender(stage, entry)}

    def entry(self, stage: Stage) -> dict[str, Any]:
        """Returns the stored plan of a study."""
        return self._job.from_first(lambda: self._read()[stage.key])

    def store(self, stage: Stage, entry: dict[str, Any]) -> None:
        """Replaces the stored plan of a study."""
        self._job.from_first(lambda: self._write(stage.key, entry))

    def _ender(self, stage: Stage, entry: dict[str, Any]) -> Callable[[int, int], bool]:
        before, start = stage.spent(), monotonic()
        estimate = Estimate(**entry["estimate"])
        least = self._config.heldout + LEAST_LEARNED

        def decide(batches: int, conversations: int) -> bool:
            marks = entry["batch_seconds"]
            if marks and batches <= marks[-1][0]:
                # Of an earlier attempt, which decided to continue.
                return False
            marks.append([batches, round(before + monotonic() - start, 3)])
            ends = study_should_end(self.minutes, entry["loading_seconds"], marks, estimate) and conversations >= least
            if ends:
                entry["batches"] = batches
            self._write(stage.key, entry)
            return ends

        return lambda batches, conversations: self._job.from_first(lambda: decide(batches, conversations))

    def _new_entry(self) -> dict[str, Any]:
        return {
            "budget_minutes": self.minutes,
            "loading_seconds": round(self.loading, 3),
            "estimate": dataclasses.asdict(self._estimate()),
            "batch_seconds": [],
            "steps": {},
        }

    def _refuse_if_too_small(self, entry: dict[str, Any]) -> None:
        estimate, config = Estimate(**entry["estimate"]), self._config
        kept = config.study.requests_per_batch / expected_messages(1)
        least = least_minutes(estimate, entry["loading_seconds"], config.heldout, kept)
        if self.minutes < least:
            raise UserError(
                f"budget_minutes={self.minutes:g} is too short on this machine: loading, evaluation and the least of study "
                f"and training take about {least:g} minutes; give budget_minutes={least:g} or more, or lower "
                "evaluation.max_questions"
            )
        whole = (entry["loading_seconds"] + COMPILE_SECONDS + estimate.study + estimate.train + estimate.evaluate) / 60
        self._say(
            f"budget of {self.minutes:g} minutes, where auto sizes take about {whole:.0f}: self-study ends in time, and the "
            "steps follow from what is left"
        )

    def _read(self) -> dict[str, Any]:
        return read_json(self._path)["studies"] if self._path.exists() else {}

    def _write(self, key: str, entry: dict[str, Any]) -> None:
        write_json(self._path, {"format": 1, "studies": {**self._read(), key: entry}})


def open_budget(run: RunContext, auto: RunConfig, started: float) -> Budget:
    """The budget of a run that is ready to study.

    Args:
      run: its config has the sizes of `with_budget`.
      auto: with auto sizes.
      started: `monotonic()` at the start of the run.
    """

    def estimate() -> Estimate:
        sizes = expected_sizes(auto)
        asked = min(len(run.questions), auto.evaluation.max_questions or len(run.questions))
        flops = measured_flops(run.model.config, "bfloat16" if auto.weights == "bfloat16" else auto.dtype)
        seconds = estimated_seconds(auto, run.model.config, sizes, run.corpus.num_tokens, asked, flops)
        messages = expected_messages(sizes.conversations)
        batch = seconds["study"] * run.config.study.requests_per_batch / messages
        return Estimate(
            study=seconds["study"],
            train=seconds["train"],
            evaluate=_EVALUATION_SHARE * seconds["evaluate"],
            batch=batch,
            conversations=sizes.conversations,
            steps=sizes.steps,
        )

    loading = _START_SECONDS + monotonic() - started
    return Budget(run.config, run.workdir, run.job, loading, estimate, run.reporter.say)


def with_steps(run: RunContext, budget: Budget, study: Stage, conversations: Sequence[Conversation]) -> RunConfig:
    """The config with the number of conversations that the study reached and the steps that the budget leaves time for.

    At the first start this measures the baselines and times the train step, and stores the decision.
    """
    config, entry = run.config, budget.entry(study)
    estimate = Estimate(**entry["estimate"])
    key = _training_key(run, conversations)
    if key not in entry["steps"]:
        started = monotonic()
        settings = config.train
        data = training_data(
            run.model, conversations, run.questions, settings, heldout=config.heldout, seed=config.seed
        )

        def steps_of(num_tokens: float, epochs: float) -> int:
            return auto_steps(round(num_tokens), epochs, settings.rows_per_step, settings.row_tokens)

        reached = steps_of(data.num_tokens, settings.epochs)
        per_conversation = data.num_tokens / len(data.parts.training)
        auto = steps_of(per_conversation * max(estimate.conversations - config.heldout, 1), settings.epochs)
        initial = initial_prefix(run.model, run.corpus, config.cartridge, config.seed)
        run.reporter.say("evaluating what needs no cartridge, and timing the train step")
        _measure_baselines(run, budget, conversations, initial)
        trial_started = monotonic()
        timed = measure_steps(
            run.model,
            initial,
            data.examples,
            data.heldout,
            dataclasses.replace(settings, steps=reached),
            learner=make_learner(settings.learner, num_frozen=config.cartridge.num_frozen),
            seed=config.seed,
            job=run.job,
            clock=monotonic,
        )
        budget.trial_seconds = monotonic() - trial_started
        run.stop.check()
        assert budget.baselines is not None
        evaluation = 0.0
        if SUBJECT in config.evaluation.conditions:
            evaluation = _CARTRIDGE_SHARE * min(budget.baselines.seconds.values())

        def decided() -> dict[str, Any]:
            spent = entry["loading_seconds"] + entry["batch_seconds"][-1][1] + monotonic() - started
            left = usable_seconds(entry["budget_minutes"]) - spent - evaluation
            most = steps_of(data.num_tokens, _MOST_EPOCHS * settings.epochs)
            steps = fitting_steps(left, timed.step, timed.heldout, settings.eval_every, LEAST_STEPS, most)
            return {
                "conversations": len(conversations),
                "steps": steps,
                "auto_steps": auto,
                "step_seconds": timed.step,
                "heldout_seconds": timed.heldout,
                "baseline_seconds": budget.baseline_seconds,
                "cartridge_evaluation_seconds": evaluation,
                "left_seconds": left,
            }

        entry["steps"][key] = run.job.from_first(decided)
        budget.store(study, entry)
    found = entry["steps"][key]
    run.reporter.say(in_words(budget.minutes, len(conversations), found["steps"], estimate, found["auto_steps"]))
    if found["left_seconds"] < found["steps"] * found["step_seconds"]:
        run.reporter.say("the run will take longer than its budget: give it more minutes, or a machine with less load")
    return dataclasses.replace(
        config,
        study=dataclasses.replace(config.study, conversations=len(conversations)),
        train=dataclasses.replace(config.train, steps=found["steps"]),
    )


def _measure_baselines(
    run: RunContext, budget: Budget, conversations: Sequence[Conversation], initial: KVPrefix
) -> None:
    """Measures the conditions of the evaluation that need no cartridge."""
    settings, started = run.config.evaluation, monotonic()
    tasks, room = make_examples(run, conversations)
    conditions = make_conditions(run.model, run.corpus, initial, settings.conditions, room=room, seed=run.config.seed)
    with run.progress("evaluate", 1) as bar:

        def advance(done: int, total: int) -> None:
            bar.at(done, total)
            run.stop.check()

        budget.baselines = measure_baselines(
            run.model, conditions, tasks, settings, clock=monotonic, on_progress=advance
        )
    budget.baseline_seconds = monotonic() - started


def _training_key(run: RunContext, conversations: Sequence[Conversation]) -> str:
    """A hash of the inputs, besides the study, that a decision about steps belongs to."""
    config = run.config
    parts = {
        "train": dataclasses.asdict(config.train),
        "cartridge": dataclasses.asdict(config.cartridge),
        "heldout": config.heldout,
        "questions": questions_hash(run.questions),
        "conversations": len(conversations),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
