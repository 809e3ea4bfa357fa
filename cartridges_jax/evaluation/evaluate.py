"""Measures conditions on the examples of tasks.

The judge is the model with the whole text in context: its greedy answers are what `teacher_kl` is measured on, and it
scores the answers that each condition gives freely (`own_nll`). Nothing here is drawn at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import CONDITIONS, JUDGE, SUBJECT, Condition, condition_title
from cartridges_jax.evaluation.measuring import Measuring
from cartridges_jax.evaluation.results import add_closed, shown_answers, summarise
from cartridges_jax.evaluation.tasks import Task, check_task
from cartridges_jax.models import Model
from cartridges_jax.parallel import place_prefix


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation.

    Attributes:
      max_answer_tokens: greedy answers are cut here.
      max_questions: at most that many of the human questions, spread evenly; 0 takes all.
      conditions: names of the prefix registry, and "cartridge"; "whole_text", the judge, must be among them.
      tasks: names of the task registry.
    """

    max_answer_tokens: int = 40
    max_questions: int = 48
    conditions: tuple[str, ...] = CONDITIONS
    tasks: tuple[str, ...] = ("questions", "heldout")

    def __post_init__(self) -> None:
        # A flag gives "none,whole_text" as one name.
        for field in ("conditions", "tasks"):
            names = getattr(self, field)
            given = [names] if isinstance(names, str) else names
            object.__setattr__(self, field, tuple(part.strip() for name in given for part in name.split(",")))

    def check(self) -> None:
        """Raises UserError for a value that no run could use."""
        if self.max_answer_tokens < 1:
            raise UserError(f"evaluation.max_answer_tokens={self.max_answer_tokens}: must be 1 or more")
        if self.max_questions < 0:
            raise UserError(f"evaluation.max_questions={self.max_questions}: must be 0 (all) or more")
        for field, names in (("conditions", self.conditions), ("tasks", self.tasks)):
            if len(set(names)) < len(names) or not names:
                raise UserError(f"evaluation.{field}={names!r}: give one or more different names")
        for name in self.conditions:
            condition_title(name)
        if JUDGE not in self.conditions:
            raise UserError(f"evaluation.conditions={self.conditions!r} lacks the judge: add {JUDGE!r}")
        for name in self.tasks:
            check_task(name)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
      conditions: condition to metric to value, None where it is undefined.
      condition_list: name, title and role of every condition, in the order to show them, the judge last.
      metric_list: the fields of every `Metric`, in the order to show them.
      headline: kl_closed, gap_closed and facts of the cartridge, each None where it is undefined.
      reasons: dotted path of every None to the reason.
      answers: examples to show: the question, its references, and each condition's answer with its scores.
      rows: one row per example and condition, as `answers.parquet` holds them.
    """

    conditions: dict[str, dict[str, float | None]]
    condition_list: list[dict[str, str]]
    metric_list: list[dict[str, Any]]
    headline: dict[str, float | None]
    reasons: dict[str, str]
    answers: list[dict[str, Any]]
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Baselines:
    """The part of an evaluation that does not depend on the cartridge.

    Attributes:
      conditions: those of the evaluation; the cartridge's is a stand-in.
      measuring: with the judge's answers.
      rows: condition to its rows.
      seconds: condition to the time that it took; the judge's answers count as the judge's.
    """

    conditions: list[Condition]
    measuring: Measuring
    rows: dict[str, list[dict[str, Any]]]
    seconds: dict[str, float]

    def with_cartridge(self, model: Model, cartridge: KVPrefix) -> list[Condition]:
        """The conditions with the cartridge in its place."""
        prefix = place_prefix(cartridge, model.mesh, in_use=True)
        return [
            dataclasses.replace(condition, prefix=prefix) if condition.name == SUBJECT else condition
            for condition in self.conditions
        ]


def measure_baselines(
    model: Model,
    conditions: Sequence[Condition],
    tasks: Sequence[Task],
    settings: EvaluationSettings,
    *,
    clock: Callable[[], float],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Baselines:
    """Measures every condition but the cartridge, before there is one, for an `evaluate` in the same process.

    Args:
      conditions: with any prefix for the cartridge.
      clock: seconds from any origin.
    """
    start = clock()
    measuring = Measuring(model, conditions, tasks, settings.max_answer_tokens, on_progress)
    rows, seconds = {}, {JUDGE: clock() - start}
    for condition in conditions:
        if condition.name != SUBJECT:
            start = clock()
            rows[condition.name] = measuring.rows(condition)
            seconds[condition.name] = seconds.get(condition.name, 0.0) + clock() - start
    return Baselines(list(conditions), measuring, rows, seconds)


def evaluate(
    model: Model,
    conditions: Sequence[Condition],
    tasks: Sequence[Task],
    settings: EvaluationSettings | None = None,
    *,
    baselines: Baselines | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answers and scores every example under every condition.

    Args:
      conditions: among them the judge, "whole_text".
      tasks: from `make_tasks`, or made by hand; of two metrics with the same name the later task's carries the task's
        name.
      settings: the defaults if None; its `max_answer_tokens` counts here.
      baselines: of the same conditions, tasks and settings, where they are measured already.
      on_progress: called with (sequences done, sequences in all).

    Raises:
      UserError: no examples at all, no judge, or an example that exceeds the model's context.
      ValueError: a task that returns scores without a metric.
    """
    settings = settings or EvaluationSettings()
    if not any(task.examples for task in tasks):
        raise UserError("there is nothing to evaluate on: give questions, or hold conversations out")
    if baselines is None:
        known, measuring = {}, Measuring(model, conditions, tasks, settings.max_answer_tokens, on_progress)
    else:
        known, measuring = baselines.rows, baselines.measuring
        measuring.report_to(on_progress)
    rows = [row for condition in conditions for row in known.get(condition.name) or measuring.rows(condition)]
    measures, metrics, reasons = summarise(rows, conditions, tasks)
    add_closed(measures, metrics, reasons)
    headline = {}
    for name in ("kl_closed", "gap_closed", "facts"):
        headline[name] = measures.get(SUBJECT, {}).get(name)
        if headline[name] is None:
            reasons[name] = reasons.get(f"conditions.{SUBJECT}.{name}", "no condition or task gave this number")
    ordered = sorted(conditions, key=lambda condition: condition.role == "judge")
    on_progress(measuring.total, measuring.total)
    return Evaluation(
        measures,
        [{"name": c.name, "title": c.title or c.name, "role": c.role} for c in ordered],
        [dataclasses.asdict(metric) for metric in metrics],
        headline,
        reasons,
        shown_answers(rows, tasks),
        rows,
    )
