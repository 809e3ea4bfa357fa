"""The measurements of single examples under single conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import JUDGE, Condition
from cartridges_jax.evaluation.scoring import Scored, answer_hidden, token_kl, token_nll
from cartridges_jax.evaluation.tasks import Example, Task
from cartridges_jax.models import Model

# Measured per token: a row holds the sum over the example's tokens, in nats, and their count.
TOKEN_MEASURES = ("teacher_kl", "heldout_kl", "answer_nll", "own_nll")


def prompt_of(model: Model, example: Example) -> list[int]:
    """The tokens after which an example is answered, for use after a KV prefix."""
    return model.chat.render_continuation(example.messages).token_ids


def scored_reference(model: Model, example: Example) -> Scored:
    """The first reference answer as the chat template renders it, the end of the turn included.

    The tokens are those after the generation prompt, so that a reference is scored in the place where a condition
    would write its own answer. Templates that write a finished answer differently from how they prompt for one (a
    block of thoughts, say) have the content's tokens placed after the prompt.
    """
    prompt = prompt_of(model, example)
    reference = {"role": "assistant", "content": example.references[0]}
    rendered = model.chat.render_continuation([*example.messages, reference], add_generation_prompt=False)
    start, end = rendered.spans[-1]
    if rendered.token_ids[: len(prompt)] == prompt and start >= len(prompt):
        start = len(prompt)
    stops = (n for n, token in enumerate(rendered.token_ids) if n >= end and token in model.chat.stop_ids)
    stop = next(stops, None)
    closing = [model.chat.end_of_turn_id] if stop is None else rendered.token_ids[end : stop + 1]
    return Scored(prompt, rendered.token_ids[start:end] + closing)


def longest_example(model: Model, tasks: Sequence[Task], max_answer_tokens: int) -> int:
    """Positions that the longest example takes after a prefix, with its longest answer."""
    longest = 0
    for example in (example for task in tasks for example in task.examples):
        prompt, answers = len(prompt_of(model, example)), [len(example.given_ids)]
        if example.is_answered:
            answers.append(max_answer_tokens)
        if example.references:
            answers.append(len(scored_reference(model, example).answer_ids))
        longest = max(longest, prompt + max(answers))
    return longest


class Measuring:
    """The examples of all tasks, what the judge answered, and the measurements of a condition on both.

    Attributes:
      total: sequences to answer or score, under all conditions.
    """

    def __init__(
        self,
        model: Model,
        conditions: Sequence[Condition],
        tasks: Sequence[Task],
        max_answer_tokens: int,
        on_progress: Callable[[int, int], None],
    ):
        judge = next((condition for condition in conditions if condition.name == JUDGE), None)
        if judge is None:
            raise UserError(f"the conditions lack the judge: add {JUDGE!r}")
        self._model, self._judge = model, judge
        self._max_answer_tokens, self._on_progress = max_answer_tokens, on_progress
        self._examples = [(task, example) for task in tasks for example in task.examples]
        examples = [example for _, example in self._examples]
        # Indices of the examples that each kind of measurement is made on, and the sequences it scores.
        self._answered = [i for i, example in enumerate(examples) if example.is_answered]
        self._given = [i for i, example in enumerate(examples) if example.given_ids]
        self._referenced = [i for i, example in enumerate(examples) if example.references]
        # A given answer takes the place of the judge's.
        self._compared = [i for i in self._answered if not examples[i].given_ids]
        self._prompts = {i: prompt_of(model, examples[i]) for i in {*self._answered, *self._given}}
        self._given_items = [Scored(self._prompts[i], list(examples[i].given_ids)) for i in self._given]
        self._reference_items = [scored_reference(model, examples[i]) for i in self._referenced]
        per_condition = 3 * len(self._answered) + len(self._referenced) + len(self._given)
        self._done, self.total = 0, len(conditions) * per_condition
        on_progress(0, self.total)

        self._judged = self._answers(judge)
        self._judge_on_judged = self._hidden(judge, self._judged)
        self._judge_on_given = self._hidden(judge, self._given_items)

    def report_to(self, on_progress: Callable[[int, int], None]) -> None:
        """Replaces the receiver of the progress."""
        self._on_progress = on_progress

    def rows(self, condition: Condition) -> list[dict[str, Any]]:
        """One row per example: its texts, its scores, and sums and counts of what is measured per token."""
        is_judge = condition is self._judge
        rows = [self._blank_row(condition, task, example) for task, example in self._examples]

        own = self._judged if is_judge else self._answers(condition)
        judge_on_own = self._judge_on_judged if is_judge else self._hidden(self._judge, own)
        self._fill(rows, "own_nll", self._answered, self._nll(judge_on_own, own))

        places = [n for n, i in enumerate(self._answered) if i in set(self._compared)]
        judged, judge_hidden = [self._judged[n] for n in places], [self._judge_on_judged[n] for n in places]
        on_judged = judge_hidden if is_judge else self._hidden(condition, judged)
        self._fill(rows, "teacher_kl", self._compared, self._kl(judge_hidden, on_judged))

        on_given = self._judge_on_given if is_judge else self._hidden(condition, self._given_items)
        self._fill(rows, "heldout_kl", self._given, self._kl(self._judge_on_given, on_given))

        on_references = self._hidden(condition, self._reference_items)
        self._fill(rows, "answer_nll", self._referenced, self._nll(on_references, self._reference_items))

        for i, item in zip(self._answered, own):
            task, example = self._examples[i]
            rows[i]["answer"] = self._text(item.answer_ids)
            rows[i]["scores"] = _scores(task, example, rows[i]["answer"])
        return rows

    def _blank_row(self, condition: Condition, task: Task, example: Example) -> dict[str, Any]:
        return {
            "task": task.name,
            "example_id": example.id,
            "condition": condition.name,
            "question": example.question,
            "references": list(example.references) or [self._text(example.given_ids)],
            "answer": None,
            "scores": {},
        }

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._model.tokenizer.decode(list(token_ids)).strip()

    def _answers(self, condition: Condition) -> list[Scored]:
        prompts = [self._prompts[i] for i in self._answered]
        if not prompts:
            return []
        generations = sampling.generate_tokens(
            self._model,
            prompts,
            condition.prefix,
            max_tokens=self._max_answer_tokens,
            on_progress=self._advance,
        )
        return [Scored(prompt, generation.token_ids) for prompt, generation in zip(prompts, generations)]

    def _hidden(self, condition: Condition, items: list[Scored]) -> list[np.ndarray]:
        """Final hidden states [answer tokens, D] of every item."""
        if not items:
            return []
        hidden = answer_hidden(self._model, condition.prefix, items, on_progress=self._advance)
        return np.split(hidden, np.cumsum([len(item.answer_ids) for item in items])[:-1])

    def _nll(self, hidden: list[np.ndarray], items: list[Scored]) -> list[np.ndarray]:
        if not items:
            return []
        return _like(hidden, token_nll(self._model, np.concatenate(hidden), items))

    def _kl(self, teacher: list[np.ndarray], hidden: list[np.ndarray]) -> list[np.ndarray]:
        if not hidden:
            return []
        return _like(hidden, token_kl(self._model, np.concatenate(teacher), np.concatenate(hidden)))

    @staticmethod
    def _fill(rows: list[dict[str, Any]], measure: str, places: list[int], values: list[np.ndarray]) -> None:
        for i, of_example in zip(places, values, strict=True):
            rows[i][f"{measure}_sum"] = float(np.sum(of_example, dtype=np.float64))
            rows[i][f"{measure}_tokens"] = len(of_example)

    def _advance(self, count: int) -> None:
        self._done += count
        self._on_progress(min(self._done, self.total), self.total)


def _scores(task: Task, example: Example, answer: str) -> dict[str, float]:
    scores = task.score(example, answer)
    unknown = sorted(set(scores) - {metric.name for metric in task.metrics})
    if unknown:
        raise ValueError(f"task {task.name!r} returns the score {unknown[0]!r}, which is not among its metrics")
    return {name: float(value) for name, value in scores.items()}


def _like(pieces: list[np.ndarray], values: np.ndarray) -> list[np.ndarray]:
    """[sum of lengths] cut into pieces of these lengths."""
    return np.split(values, np.cumsum([len(piece) for piece in pieces])[:-1])
