"""What a run reads before it starts: the document and its questions."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from cartridges_jax.corpus.documents import QUICKSTART, Document, read_document
from cartridges_jax.corpus.questions import Question, read_questions
from cartridges_jax.corpus.squad import read_squad_article
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.workdir import Workdir
from cartridges_jax.text.tokenizer import Tokenizer

# A SQuAD article has no length limit of its own.
_ALL_TOKENS = 2**31 - 1


def read_inputs(config: RunConfig, tokenizer: Tokenizer) -> tuple[Document, list[Question]]:
    """The document, and the human questions about it (perhaps none).

    Raises:
      UserError: a missing, empty or binary file, or settings that contradict each other.
    """
    if config.max_tokens < 0:
        raise UserError(f"max_tokens={config.max_tokens}: must be 0 (all) or more")
    if config.article:
        if config.questions:
            raise UserError(
                f"article={config.article!r} brings its own questions: leave out questions={config.questions!r}"
            )
        return read_squad_article(
            config.corpus, config.article, max_tokens=config.max_tokens or _ALL_TOKENS, tokenizer=tokenizer
        )
    if config.max_tokens:
        raise UserError(f"max_tokens={config.max_tokens} cuts a SQuAD article only: name one with --config.article=…")
    document = read_document(config.corpus)
    if config.questions:
        return document, read_questions(config.questions)
    if config.corpus == QUICKSTART:
        with resources.as_file(resources.files("cartridges_jax") / "assets" / "quickstart_questions.jsonl") as path:
            return document, read_questions(path)
    return document, []


def check_paths(config: RunConfig) -> None:
    """Refuses files that cannot be read, before the model is loaded."""
    if not config.article:
        read_document(config.corpus)
    elif not Path(config.corpus).is_file():
        raise UserError(f"corpus {config.corpus} does not exist: give a SQuAD JSON file")
    if config.questions:
        read_questions(config.questions)


def freeze_questions(workdir: Workdir, questions: list[Question]) -> Path:
    """Writes the evaluation questions into the workdir, before self-study starts (rule 1)."""
    path = workdir.path / "questions.jsonl"
    lines = [
        json.dumps({"question": q.question, "answers": list(q.answers)}, ensure_ascii=False) + "\n" for q in questions
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path
