"""Scores of answers (as in SQuAD, arXiv 1606.05250) and the fraction of a gap that a condition closes."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower-cases, drops punctuation and English articles, and makes white space single: SQuAD's own rule.

    Punctuation is removed, not replaced by a space, as SQuAD's script does; typographic quotes and dashes go as well.
    """
    kept = "".join(
        c for c in text.lower() if c not in string.punctuation and not unicodedata.category(c).startswith("P")
    )
    return " ".join(_ARTICLES.sub(" ", kept).split())


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 between the prediction's words and those of an answer, in [0, 1].

    Raises:
      ValueError: if there are no answers.
    """
    return max(_f1(normalise_answer(prediction).split(), normalise_answer(answer).split()) for answer in _some(answers))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised answer, else 0.0.

    Raises:
      ValueError: if there are no answers.
    """
    return float(normalise_answer(prediction) in {normalise_answer(answer) for answer in _some(answers)})


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Returns whether the prediction contains an answer as whole words, both normalised; kinder to full sentences."""
    padded = f" {normalise_answer(prediction)} "
    return any((words := normalise_answer(answer)) and f" {words} " in padded for answer in answers)


def closed_fraction(
    none: float | None, condition: float | None, reference: float | None
) -> tuple[float | None, str | None]:
    """The fraction of the way from `none` down to `reference` that a condition goes; below 0 is worse than nothing.

    For KL to the reference's own distribution `reference` is 0, and this is 1 - condition / none.

    Args:
      none, condition, reference: losses in nats per token (lower is better): without the document, with what is
        measured, and with the whole document.

    Returns:
      The fraction and None; or None and the reason why there is no such fraction.
    """
    for name, value in (("none", none), ("condition", condition), ("reference", reference)):
        if value is None or not math.isfinite(value):
            return None, f"the value of '{name}' is {'missing' if value is None else value}"
    if none <= reference:
        return None, f"the reference ({reference:.4g}) is no better than having no document ({none:.4g})"
    return (none - condition) / (none - reference), None


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers is {answers!r}; give a list of one or more strings")
    return answers
