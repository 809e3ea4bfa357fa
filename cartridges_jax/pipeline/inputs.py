"""The inputs of a run: the corpus and the questions, read before the model is loaded."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

from cartridges_jax.corpus import QUICKSTART, Corpus, TokenizedCorpus, read_corpus, tokenize_corpus
from cartridges_jax.corpus.questions import Question, read_questions
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.workdir import Workdir
from cartridges_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that a run reads from files; each file is read once.

    Attributes:
      corpus: whole documents.
      questions: those of a questions file; None where the documents bring their own, if any.
    """

    corpus: Corpus
    questions: list[Question] | None


def read_inputs(config: RunConfig) -> Inputs:
    """Reads the corpus and the questions file.

    Raises:
      UserError: a missing, empty or binary file, or settings that contradict each other.
    """
    corpus = read_corpus(config.corpus).select(config.article)
    if config.questions:
        if corpus.questions:
            raise UserError(
                f"corpus={config.corpus!r} brings its own questions: leave out questions={config.questions!r}"
            )
        return Inputs(corpus, read_questions(config.questions))
    if config.corpus == QUICKSTART:
        with resources.as_file(resources.files("cartridges_jax") / "assets" / "quickstart_questions.jsonl") as path:
            return Inputs(corpus, read_questions(path))
    return Inputs(corpus, None)


def tokenized_inputs(inputs: Inputs, config: RunConfig, tokenizer: Tokenizer) -> tuple[TokenizedCorpus, list[Question]]:
    """The corpus in tokens, cut to `config.max_tokens` per document, and the questions it answers.

    Raises:
      UserError: as `tokenize_corpus`, or a text that leaves nothing to ask about.
    """
    corpus = tokenize_corpus(inputs.corpus, tokenizer, max_tokens=config.max_tokens)
    return corpus, corpus.corpus.questions if inputs.questions is None else inputs.questions


def freeze_questions(workdir: Workdir, questions: list[Question]) -> Path:
    """Writes the evaluation questions into the workdir, before self-study starts (rule 1)."""
    path = workdir.path / "questions.jsonl"
    lines = [
        json.dumps({"question": q.question, "answers": list(q.answers)}, ensure_ascii=False) + "\n" for q in questions
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path
