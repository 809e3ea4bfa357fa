"""Measures the four conditions on the same questions.

The judge is the model with the whole document in context: its greedy answers are what
`teacher_kl` is measured on, and it scores the answers that each condition gives freely
(`own_nll`).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.corpus.questions import Question
from cartridges_jax.data.conversations import Conversation
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import Condition
from cartridges_jax.evaluation.metrics import closed_fraction, exact_match, token_f1
from cartridges_jax.evaluation.scoring import Scored, answer_hidden, token_kl, token_nll
from cartridges_jax.models import Model

_NO_QUESTIONS = "no human questions were given"
_NO_HELDOUT = "no self-study conversations were held out"


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How a cartridge is measured.

    Attributes:
      max_answer_tokens: greedy answers are cut here.
      max_questions: at most so many of the questions, spread evenly; 0 takes all.
    """

    max_answer_tokens: int
    max_questions: int

    def check(self) -> None:
        """Raises UserError for a value that no run could use."""
        if self.max_answer_tokens < 1:
            raise UserError(f"evaluation.max_answer_tokens={self.max_answer_tokens}: must be 1 or more")
        if self.max_questions < 0:
            raise UserError(f"evaluation.max_questions={self.max_questions}: must be 0 (all) or more")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
      conditions: name to measures (see the README's table); None where undefined.
      closed: kl_closed, kl_closed_truncated and gap_closed, each None where undefined.
      reasons: dotted path of every None to why.
      answers: per question, the references and what each condition answered.
    """

    conditions: dict[str, dict[str, float | None]]
    closed: dict[str, float | None]
    reasons: dict[str, str]
    answers: list[dict[str, Any]]


def evaluate(
    model: Model,
    conditions: Sequence[Condition],
    questions: Sequence[Question],
    heldout: Sequence[Conversation],
    settings: EvaluationSettings,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answers and scores every question under every condition.

    Args:
      conditions: among them one named "icl", the judge.
      questions: human questions; without any, the held-out conversations' are answered.
      heldout: self-study conversations that were not trained on.
      on_progress: called with (sequences done, sequences in all).

    Raises:
      UserError: neither questions nor held-out conversations.
    """
    if not questions and not heldout:
        raise UserError("there is nothing to evaluate on: give questions, or hold conversations out")
    judge = next(condition for condition in conditions if condition.name == "icl")
    asked = [q.question for q in questions] or [c.messages[0].content for c in heldout]
    prompts = [_prompt(model, question) for question in asked]
    references = [
        Scored(prompt, model.tokenizer.encode(q.answers[0])) for prompt, q in zip(prompts, questions)
    ]
    kept_out = [Scored(_prompt(model, c.messages[0].content), c.messages[1].token_ids) for c in heldout]
    per_condition = 3 * len(prompts) + len(references) + len(kept_out)
    total, done = len(conditions) * per_condition, 0
    on_progress(0, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, total), total)

    def answer(condition: Condition) -> list[Scored]:
        generations = sampling.generate_tokens(
            model, prompts, condition.prefix, max_tokens=settings.max_answer_tokens, on_progress=advance,
        )
        return [Scored(prompt, generation.token_ids) for prompt, generation in zip(prompts, generations)]

    def hidden(condition: Condition, items: list[Scored]) -> np.ndarray:
        return answer_hidden(model, condition.prefix, items, on_progress=advance)

    judged = answer(judge)
    judge_on_judged = hidden(judge, judged)
    judge_on_kept_out = hidden(judge, kept_out) if kept_out else None
    measures: dict[str, dict[str, float | None]] = {}
    texts: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for condition in conditions:
        is_judge = condition is judge
        own = judged if is_judge else answer(condition)
        texts[condition.name] = [model.tokenizer.decode(item.answer_ids).strip() for item in own]
        values: dict[str, float | None] = {
            "answer_nll": None, "teacher_kl": None, "heldout_kl": None, "own_nll": None, "f1": None, "exact_match": None,
            "prefix_tokens": condition.prefix_tokens, "kv_bytes": condition.kv_bytes,
        }
        judge_on_own = judge_on_judged if is_judge else hidden(judge, own)
        values["own_nll"] = float(token_nll(model, judge_on_own, own).mean())
        if questions:
            on_judged = judge_on_judged if is_judge else hidden(condition, judged)
            values["teacher_kl"] = float(token_kl(model, judge_on_judged, on_judged).mean())
            values["answer_nll"] = float(token_nll(model, hidden(condition, references), references).mean())
            pairs = list(zip(texts[condition.name], questions))
            values["f1"] = float(np.mean([token_f1(text, q.answers) for text, q in pairs]))
            values["exact_match"] = float(np.mean([exact_match(text, q.answers) for text, q in pairs]))
        if kept_out:
            on_kept_out = judge_on_kept_out if is_judge else hidden(condition, kept_out)
            values["heldout_kl"] = float(token_kl(model, judge_on_kept_out, on_kept_out).mean())
        for name, value in values.items():
            if value is None:
                reason = _NO_HELDOUT if name == "heldout_kl" else _NO_QUESTIONS
                reasons[f"conditions.{condition.name}.{name}"] = reason
        measures[condition.name] = values
    on_progress(total, total)

    closed = _closed(measures, "teacher_kl" if questions else "heldout_kl", reasons)
    answers = [
        {
            "question": question,
            "references": list(questions[i].answers) if questions else [heldout[i].messages[1].content],
            **{name: texts[name][i] for name in texts},
        }
        for i, question in enumerate(asked)
    ]
    return Evaluation(measures, closed, reasons, answers)


def _prompt(model: Model, question: str) -> list[int]:
    return model.chat.render_continuation([{"role": "user", "content": question}]).token_ids


def _closed(measures, divergence: str, reasons: dict[str, str]) -> dict[str, float | None]:
    closed: dict[str, float | None] = {}
    for name, condition, measure, reference in (
        ("kl_closed", "cartridge", divergence, 0.0),
        ("kl_closed_truncated", "truncated", divergence, 0.0),
        ("gap_closed", "cartridge", "answer_nll", measures["icl"]["answer_nll"]),
    ):
        none, value = measures["none"][measure], measures[condition][measure]
        if none is None or value is None or reference is None:
            closed[name], reason = None, _NO_QUESTIONS
        else:
            closed[name], reason = closed_fraction(none, value, reference)
        if closed[name] is None:
            reasons[name] = reason
    return closed
