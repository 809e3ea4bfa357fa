"""Evaluation: the examples of all tasks under every condition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cartridges_jax.checkpoint import Cartridge
from cartridges_jax.corpus.questions import Question, questions_hash
from cartridges_jax.data.schema import Conversation
from cartridges_jax.evaluation.conditions import condition_fingerprints, make_conditions, tokens_cut
from cartridges_jax.evaluation.evaluate import evaluate as measure
from cartridges_jax.evaluation.measuring import longest_example
from cartridges_jax.evaluation.results import write_answers
from cartridges_jax.evaluation.tasks import Task, TaskInputs, make_tasks
from cartridges_jax.pipeline.distillation import split, spread
from cartridges_jax.pipeline.stages.context import RunContext, flat
from cartridges_jax.pipeline.workdir import Stage

ANSWERS = "answers.parquet"


def evaluate(run: RunContext, train_stage: Stage, cartridge: Cartridge, conversations: list[Conversation]) -> Stage:
    """Measures the conditions, or reads a finished evaluation back; per-example results are in the stage's directory."""
    settings = run.config.evaluation
    questions = asked_questions(run)
    stage = run.open("evaluate", {
        "train": train_stage.key,
        "questions": questions_hash(questions),
        **flat("evaluation", settings),
        "prefixes": condition_fingerprints(settings.conditions),
    })  # fmt: skip
    if stage.done:
        return stage
    baselines, already = (None, 0.0) if run.budget is None else (run.budget.baselines, run.budget.baseline_seconds)
    with stage.clock(already) as clock, run.progress("evaluate", 1) as bar:

        def advance(done: int, total: int) -> None:
            bar.at(done, total)
            clock.tick()
            run.stop.check()

        tasks, room = make_examples(run, conversations)
        if baselines is None:
            conditions = make_conditions(
                run.model, run.corpus, cartridge.prefix, settings.conditions, room=room, seed=run.config.seed
            )
        else:
            conditions = baselines.with_cartridge(run.model, cartridge.prefix)
        measured = measure(run.model, conditions, tasks, settings, baselines=baselines, on_progress=advance)
    if run.job.is_first:
        write_answers(stage.directory / ANSWERS, measured.rows)
    stage.finish({
        **{field.name: getattr(measured, field.name) for field in dataclasses.fields(measured) if field.name != "rows"},
        "examples": {task.name: len(task.examples) for task in tasks},
        "tokens_cut": tokens_cut(run.model, run.corpus, room),
    })  # fmt: skip
    return stage


def make_examples(run: RunContext, conversations: Sequence[Conversation]) -> tuple[list[Task], int]:
    """The tasks with their examples, and the positions that the longest one needs after a prefix."""
    settings = run.config.evaluation
    parts = split(conversations, run.questions, run.config.heldout, run.config.seed)
    heldout = [conversations[i] for i in parts.heldout]
    tasks = make_tasks(settings.tasks, TaskInputs(run.corpus, asked_questions(run), heldout))
    return tasks, longest_example(run.model, tasks, settings.max_answer_tokens)


def asked_questions(run: RunContext) -> list[Question]:
    """The questions that are asked: all, or `evaluation.max_questions` of them spread evenly."""
    return spread(run.questions, run.config.evaluation.max_questions)
