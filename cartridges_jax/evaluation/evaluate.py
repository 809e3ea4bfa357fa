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
from cartridges_jax.data.schema import Conversation
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
    measuring = _Measuring(model, conditions, questions, heldout, settings, on_progress)
    found = {condition.name: measuring.of(condition) for condition in conditions}
    measures = {name: values for name, (values, _) in found.items()}
    reasons = {
        f"conditions.{name}.{measure}": _NO_HELDOUT if measure == "heldout_kl" else _NO_QUESTIONS
        for name, values in measures.items()
        for measure, value in values.items()
        if value is None
    }
    closed = _closed(measures, "teacher_kl" if questions else "heldout_kl", reasons)
    answers = [
        {
            "question": question,
            "references": list(questions[i].answers) if questions else [heldout[i].messages[1].content],
            **{name: texts[i] for name, (_, texts) in found.items()},
        }
        for i, question in enumerate(measuring.asked)
    ]
    on_progress(measuring.total, measuring.total)
    return Evaluation(measures, closed, reasons, answers)


class _Measuring:
    """What all conditions are measured on, and what the judge makes of it.

    Attributes:
      asked: the questions' words.
      total: sequences to answer or score.
    """

    def __init__(
        self,
        model: Model,
        conditions: Sequence[Condition],
        questions: Sequence[Question],
        heldout: Sequence[Conversation],
        settings: EvaluationSettings,
        on_progress: Callable[[int, int], None],
    ):
        self._model, self._questions, self._settings, self._on_progress = model, questions, settings, on_progress
        self.asked = [q.question for q in questions] or [c.messages[0].content for c in heldout]
        self._prompts = [_prompt(model, question) for question in self.asked]
        self._references = [
            Scored(prompt, model.tokenizer.encode(q.answers[0])) for prompt, q in zip(self._prompts, questions)
        ]
        self._kept_out = [Scored(_prompt(model, c.messages[0].content), c.messages[1].token_ids) for c in heldout]
        per_condition = 3 * len(self._prompts) + len(self._references) + len(self._kept_out)
        self._done, self.total = 0, len(conditions) * per_condition
        on_progress(0, self.total)
        self._judge = next(condition for condition in conditions if condition.name == "icl")
        self._judged = self._answers(self._judge)
        self._judge_on_judged = self._hidden(self._judge, self._judged)
        self._judge_on_kept_out = self._hidden(self._judge, self._kept_out) if self._kept_out else None

    def of(self, condition: Condition) -> tuple[dict[str, float | None], list[str]]:
        """A condition's measures, None where undefined, and its answers in words."""
        model, questions, kept_out, is_judge = self._model, self._questions, self._kept_out, condition is self._judge
        own = self._judged if is_judge else self._answers(condition)
        texts = [model.tokenizer.decode(item.answer_ids).strip() for item in own]
        values: dict[str, float | None] = {
            "answer_nll": None,
            "teacher_kl": None,
            "heldout_kl": None,
            "own_nll": None,
            "f1": None,
            "exact_match": None,
            "prefix_tokens": condition.prefix_tokens,
            "kv_bytes": condition.kv_bytes,
        }
        judge_on_own = self._judge_on_judged if is_judge else self._hidden(self._judge, own)
        values["own_nll"] = float(token_nll(model, judge_on_own, own).mean())
        if questions:
            on_judged = self._judge_on_judged if is_judge else self._hidden(condition, self._judged)
            values["teacher_kl"] = float(token_kl(model, self._judge_on_judged, on_judged).mean())
            on_references = self._hidden(condition, self._references)
            values["answer_nll"] = float(token_nll(model, on_references, self._references).mean())
            pairs = list(zip(texts, questions))
            values["f1"] = float(np.mean([token_f1(text, q.answers) for text, q in pairs]))
            values["exact_match"] = float(np.mean([exact_match(text, q.answers) for text, q in pairs]))
        if kept_out:
            on_kept_out = self._judge_on_kept_out if is_judge else self._hidden(condition, kept_out)
            values["heldout_kl"] = float(token_kl(model, self._judge_on_kept_out, on_kept_out).mean())
        return values, texts

    def _answers(self, condition: Condition) -> list[Scored]:
        generations = sampling.generate_tokens(
            self._model,
            self._prompts,
            condition.prefix,
            max_tokens=self._settings.max_answer_tokens,
            on_progress=self._advance,
        )
        return [Scored(prompt, generation.token_ids) for prompt, generation in zip(self._prompts, generations)]

    def _hidden(self, condition: Condition, items: list[Scored]) -> np.ndarray:
        return answer_hidden(self._model, condition.prefix, items, on_progress=self._advance)

    def _advance(self, count: int) -> None:
        self._done += count
        self._on_progress(min(self._done, self.total), self.total)


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
