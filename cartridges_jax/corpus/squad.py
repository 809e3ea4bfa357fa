"""Articles and questions from SQuAD files (v1.1 and v2: Rajpurkar et al., arXiv 1606.05250 and 1806.03822)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from cartridges_jax.corpus.documents import Document, read_text
from cartridges_jax.corpus.questions import Question
from cartridges_jax.corpus.sentences import Sentence, split_sentences
from cartridges_jax.errors import UserError

PARAGRAPH_BREAK = "\n\n"


class OffsetTokenizer(Protocol):
    """The part of a tokenizer that a cut at a token budget needs."""

    def encode(self, text: str) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


def read_squad_article(
    path: str | Path, title: str, *, max_tokens: int, tokenizer: OffsetTokenizer
) -> tuple[Document, list[Question]]:
    """Reads one article, cut at the last sentence end within `max_tokens`, and the questions that the cut text answers.

    Paragraphs are joined by blank lines. A question is kept when it is answerable and all of its reference answers lie
    wholly in the kept text; its evidence is the sentence (or sentences) around its first answer.

    Args:
      path: a SQuAD JSON file.
      title: of the article; case and underscores do not matter.
      max_tokens: the budget of the document, in the tokenizer's tokens.
      tokenizer: counts them.

    Raises:
      UserError: if the file is not SQuAD JSON, has no such article, or the first sentence exceeds the budget.
    """
    article = _find_article(path, title)
    try:
        whole = PARAGRAPH_BREAK.join(paragraph["context"] for paragraph in article["paragraphs"])
        answerable = list(_answerable_questions(article["paragraphs"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not SQuAD JSON ({error!r} in article {title!r}); give a v1.1 or v2 file") from None

    sentences = _leading_sentences(whole, max_tokens, tokenizer)
    if not sentences:
        raise UserError(f"max_tokens = {max_tokens} does not hold the first sentence of {title!r}; raise it")
    text = whole[: sentences[-1].end]
    questions = [
        Question(question, tuple(dict.fromkeys(answer.strip() for _, answer in spans)), _evidence(spans[0], sentences))
        for question, spans in answerable
        # An answer beyond the cut, or one whose recorded start is wrong, is not found where it should be.
        if all(text.startswith(answer, start) for start, answer in spans)
    ]
    return Document(article["title"].replace("_", " "), text), questions


def _find_article(path: str | Path, title: str) -> dict:
    try:
        articles = {article["title"]: article for article in json.loads(read_text(path))["data"]}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error.msg} on line {error.lineno}); give a SQuAD file") from None
    except (KeyError, TypeError):
        raise UserError(
            f'{path} is not SQuAD JSON (no "data" list of titled articles); give a v1.1 or v2 file'
        ) from None
    for name, article in articles.items():
        if _plain_title(name) == _plain_title(title):
            return article
    raise UserError(f"{path} has no article {title!r}; it has: {', '.join(articles)}")


def _plain_title(title: str) -> str:
    return title.replace("_", " ").strip().casefold()


def _leading_sentences(text: str, max_tokens: int, tokenizer: OffsetTokenizer) -> list[Sentence]:
    ids, offsets = tokenizer.encode_with_offsets(text)
    sentences = split_sentences(text)
    if len(ids) > max_tokens:
        limit = offsets[max_tokens][0]  # the first character that no longer fits
        sentences = [sentence for sentence in sentences if sentence.end <= limit]
        # A prefix may take a token more than it does inside the whole text: merges over the cut are lost.
        while sentences and len(tokenizer.encode(text[: sentences[-1].end])) > max_tokens:
            sentences.pop()
    return sentences


def _answerable_questions(paragraphs: list[dict]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Yields each question with its answers and where they start in the joined text, in characters."""
    offset = 0
    for paragraph in paragraphs:
        for item in paragraph["qas"]:
            spans = [(offset + answer["answer_start"], answer["text"]) for answer in item["answers"]]
            if spans and not item.get("is_impossible"):
                yield item["question"].strip(), spans
        offset += len(paragraph["context"]) + len(PARAGRAPH_BREAK)


def _evidence(span: tuple[int, str], sentences: list[Sentence]) -> str:
    start, answer = span
    return " ".join(s.text for s in sentences if s.start < start + len(answer) and start < s.end)
