"""SQuAD files (v1.1 and v2: Rajpurkar et al., arXiv 1606.05250 and 1806.03822): a document per article."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cartridges_jax.corpus.documents import BREAK, Document
from cartridges_jax.corpus.files import decode
from cartridges_jax.corpus.questions import Question
from cartridges_jax.corpus.readers import register
from cartridges_jax.corpus.sentences import Sentence, split_sentences
from cartridges_jax.errors import UserError


@register(".json")
def read_squad(path: Path, data: bytes) -> list[Document]:
    """Reads all articles, each with its answerable questions.

    Paragraphs are joined by blank lines. A question's evidence is the sentence (or sentences) around its first answer.

    Raises:
      UserError: the file is not SQuAD JSON.
    """
    try:
        articles = json.loads(decode(data, path))["data"]
        titles = [article["title"] for article in articles]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error.msg} on line {error.lineno}); give a SQuAD file") from None
    except (KeyError, TypeError):
        raise UserError(
            f'{path} is not SQuAD JSON (no "data" list of titled articles); give a v1.1 or v2 file'
        ) from None
    documents = []
    for title, article in zip(titles, articles):
        try:
            documents.append(_document(title, article["paragraphs"], str(path)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not SQuAD JSON ({error!r} in article {title!r}); give a v1.1 or v2 file"
            ) from None
    # An article without paragraphs has nothing to study.
    return [document for document in documents if document.text.strip()]


def _document(title: str, paragraphs: list[dict[str, Any]], source: str) -> Document:
    text = BREAK.join(paragraph["context"] for paragraph in paragraphs)
    sentences = split_sentences(text)
    questions, offset = [], 0
    for paragraph in paragraphs:
        for item in paragraph["qas"]:
            spans = [(offset + answer["answer_start"], answer["text"]) for answer in item["answers"]]
            # An answer whose recorded start is wrong is not found where it should be.
            if not spans or item.get("is_impossible") or not all(text.startswith(said, at) for at, said in spans):
                continue
            if not item["question"].strip() or not all(said.strip() for _, said in spans):
                continue
            questions.append(
                Question(
                    item["question"].strip(),
                    tuple(dict.fromkeys(said.strip() for _, said in spans)),
                    _evidence(spans[0], sentences),
                    tuple((at, at + len(said)) for at, said in spans),
                )
            )
        offset += len(paragraph["context"]) + len(BREAK)
    return Document(title.replace("_", " "), text, source=source, questions=tuple(questions))


def _evidence(span: tuple[int, str], sentences: list[Sentence]) -> str:
    start, answer = span
    return " ".join(s.text for s in sentences if s.start < start + len(answer) and start < s.end)
