"""Evaluation questions: one JSON object a line, frozen by a hash before self-study starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cartridges_jax.corpus.files import read_text
from cartridges_jax.errors import UserError


@dataclass(frozen=True)
class Question:
    """A human question about a document.

    Attributes:
      question: the question's words.
      answers: the answers that count as right.
      evidence: the passage that holds the answer, where it is known.
      spans: (start, end) of every answer in the document's text, in characters, where they are known.
    """

    question: str
    answers: tuple[str, ...]
    evidence: str | None = None
    spans: tuple[tuple[int, int], ...] = ()


def read_questions(path: str | Path) -> list[Question]:
    """Reads JSONL lines `{"question": str, "answers": [str, ...], "evidence": str (optional)}`; blank lines are skipped.

    Raises:
      UserError: if the file cannot be read, or a line is not such an object; the message names the line.
    """
    lines = read_text(path).split("\n")  # not splitlines: JSON strings may hold U+2028
    return [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def questions_hash(questions: Sequence[Question]) -> str:
    """Hex SHA-256 over questions, answers, evidence and their order."""
    canonical = json.dumps(
        [[question.question, question.answers, question.evidence] for question in questions], ensure_ascii=True
    )
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _parse_line(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    if not isinstance(record, dict):
        raise UserError(f'{where} is a JSON {type(record).__name__}; write {{"question": "…", "answers": ["…"]}}')
    question, answers, evidence = record.get("question"), record.get("answers"), record.get("evidence")
    if not _is_filled(question):
        raise UserError(f'{where} has "question": {question!r}; give a non-empty string')
    if not isinstance(answers, list) or not answers or not all(map(_is_filled, answers)):
        raise UserError(f'{where} has "answers": {answers!r}; give a list of one or more non-empty strings')
    if evidence is not None and not isinstance(evidence, str):
        raise UserError(f'{where} has "evidence": {evidence!r}; give a string or leave it out')
    return Question(question.strip(), tuple(dict.fromkeys(answer.strip() for answer in answers)), evidence)


def _is_filled(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
