"""The inputs of a run: the corpus and the questions, read before the model is loaded."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources

from cartridges_jax.corpus import QUICKSTART, Corpus, TokenizedCorpus, read_corpus, tokenize_corpus
from cartridges_jax.corpus.questions import Question, questions_hash, read_questions
from cartridges_jax.errors import UserError
from cartridges_jax.files import write_atomically
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.workdir import Workdir, read_json, write_json
from cartridges_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files that a run reads, each of them once.

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


def freeze_questions(workdir: Workdir, questions: list[Question], *, new_evaluation: bool = False) -> list[str]:
    """Freezes the evaluation questions in the workdir before self-study starts (rule 1 of evaluation).

    `questions.jsonl` holds the questions whole; `questions.json` holds their hash, and those of the sets that they
    replaced.

    Args:
      new_evaluation: replaces a different frozen set instead of refusing these questions.

    Returns:
      Hashes of the sets that were frozen in this workdir before, oldest first.

    Raises:
      UserError: the workdir holds other questions.
    """
    path, record = workdir.path / "questions.jsonl", workdir.path / "questions.json"
    sha256, replaced = questions_hash(questions), []
    if record.exists():
        frozen = read_json(record)
        replaced = frozen["replaced"]
        if frozen["sha256"] != sha256:
            if not new_evaluation:
                raise UserError(
                    f"workdir {workdir.path} was started with {frozen['count']} other evaluation questions "
                    f"(sha256 {frozen['sha256'][:12]}), which are frozen; these {len(questions)} have sha256 "
                    f"{sha256[:12]}: give the same questions, choose another --workdir, or start a new evaluation with "
                    "--config.new_evaluation=True, which the report will say"
                )
            replaced = [*replaced, frozen["sha256"]]
    lines = [
        json.dumps({"question": q.question, "answers": q.answers, "evidence": q.evidence}, ensure_ascii=False) + "\n"
        for q in questions
    ]
    write_atomically(path, "".join(lines))
    write_json(record, {"sha256": sha256, "count": len(questions), "replaced": replaced})
    return replaced


def replaced_questions(workdir: Workdir) -> list[str]:
    """Hashes of the evaluation questions that were frozen in this workdir before the present ones, oldest first."""
    return read_json(workdir.path / "questions.json")["replaced"]
