"""Evaluation: the same questions under every condition."""

from __future__ import annotations

import dataclasses

import numpy as np

from cartridges_jax.checkpoint import Cartridge
from cartridges_jax.corpus.questions import Question, questions_hash
from cartridges_jax.data.schema import Conversation
from cartridges_jax.evaluation.conditions import conditions
from cartridges_jax.evaluation.evaluate import evaluate as measure
from cartridges_jax.pipeline.distillation import split
from cartridges_jax.pipeline.preflight import longest_evaluated
from cartridges_jax.pipeline.stages.context import RunContext, flat
from cartridges_jax.pipeline.workdir import Stage


def evaluate(run: RunContext, train_stage: Stage, cartridge: Cartridge, conversations: list[Conversation]) -> Stage:
    """Measures the conditions, or reads a finished evaluation back."""
    config = run.config
    questions = asked_questions(run)
    stage = run.open("evaluate", {
        "train": train_stage.key,
        "questions": questions_hash(questions),
        **flat("evaluation", config.evaluation),
    })  # fmt: skip
    if stage.done:
        return stage
    parts = split(conversations, run.questions, config.heldout, config.seed)
    heldout = [conversations[i] for i in parts.heldout]
    with stage.clock() as clock, run.progress("evaluate", 1) as bar:

        def advance(done: int, total: int) -> None:
            bar.at(done, total)
            clock.tick()
            run.stop.check()

        measured_conditions, cut = conditions(
            run.model, run.corpus, cartridge.prefix, room=longest_evaluated(config, run.model, run.questions)
        )
        measured = measure(run.model, measured_conditions, questions, heldout, config.evaluation, on_progress=advance)
    stage.finish({**dataclasses.asdict(measured), "cut_from_icl": cut})
    return stage


def asked_questions(run: RunContext) -> list[Question]:
    """The questions that are asked: all, or `evaluation.max_questions` of them spread evenly."""
    limit = run.config.evaluation.max_questions
    if not limit or len(run.questions) <= limit:
        return run.questions
    places = np.linspace(0, len(run.questions) - 1, limit).round().astype(int)
    return [run.questions[i] for i in places]
