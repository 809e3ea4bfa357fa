"""Human questions with reference answers."""

from __future__ import annotations

import hashlib
import json

from cartridges_jax.corpus.questions import Question
from cartridges_jax.evaluation.metrics import contains_answer, exact_match, token_f1
from cartridges_jax.evaluation.tasks.task import Example, Metric, TaskInputs, register

FACTS = Metric(
    "facts",
    "Facts",
    format="count",
    unit="answers that contain a reference answer",
    aggregate="sum",
    mark="contains a reference answer",
    note="Facts counts the freely written answers that contain a reference answer as whole words.",
)
F1 = Metric(
    "f1", "F1", featured=False, note="F1 and exact match compare words as SQuAD does, from 0 to 1."
)  # fmt: skip
EXACT_MATCH = Metric("exact_match", "Exact match", featured=False)


@register("questions")
class Questions:
    """The questions that were frozen before self-study started."""

    name = "questions"
    metrics = (FACTS, F1, EXACT_MATCH)
    missing = "no human questions were given"

    def __init__(self, inputs: TaskInputs):
        self.examples = tuple(_example(question) for question in inputs.questions)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {
            "facts": float(contains_answer(answer, example.references)),
            "f1": token_f1(answer, example.references),
            "exact_match": exact_match(answer, example.references),
        }


def _example(question: Question) -> Example:
    # An id that does not depend on the other questions, so that runs can be compared question by question.
    content = json.dumps([question.question, question.answers]).encode("ascii")
    return Example(
        hashlib.sha256(content).hexdigest()[:12],
        ({"role": "user", "content": question.question},),
        question.answers,
        evidence=question.evidence,
    )
