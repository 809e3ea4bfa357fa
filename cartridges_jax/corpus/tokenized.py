"""A corpus in tokens: tokenised once, handed down to everything that reads it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np

from cartridges_jax.corpus.chunks import Chunk
from cartridges_jax.corpus.documents import BREAK, Corpus, Document
from cartridges_jax.corpus.sentences import Sentence, split_sentences
from cartridges_jax.errors import UserError


class OffsetTokenizer(Protocol):
    """A tokenizer that knows which characters a token covers."""

    def encode(self, text: str) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """A document with its tokens.

    Attributes:
      document: the text and its name.
      token_ids: [T] int32.
      offsets: [T, 2] int64, the half-open span of characters of every token.
    """

    document: Document
    token_ids: np.ndarray
    offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @functools.cached_property
    def sentences(self) -> list[Sentence]:
        """The sentences that questions can be about: no headings, rules or code fences."""
        return [s for s in split_sentences(self.document.text) if s.has_words and not s.heading]

    def characters(self, start: int, end: int) -> tuple[int, int]:
        """The half-open span of characters of tokens [start, end)."""
        return int(self.offsets[start][0]), int(self.offsets[end - 1][1])


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """The documents of a corpus in tokens."""

    corpus: Corpus
    documents: tuple[TokenizedDocument, ...]

    @property
    def name(self) -> str:
        return self.corpus.name

    @property
    def sha256(self) -> str:
        return self.corpus.sha256

    @property
    def text(self) -> str:
        """The whole corpus as one text (see `Corpus.text`)."""
        return self.corpus.text

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(document.num_tokens for document in self.documents)

    @functools.cached_property
    def sentences(self) -> list[tuple[int, Sentence]]:
        """(index of the document, sentence) of all askable sentences, in order."""
        return [(number, s) for number, document in enumerate(self.documents) for s in document.sentences]

    def header(self, document: int) -> str:
        """The line before a chunk that says where it comes from; empty where there is only one document."""
        return f"{self.documents[document].document.name}{BREAK}" if len(self.documents) > 1 else ""

    def chunk_text(self, chunk: Chunk) -> str:
        """A chunk as a teacher reads it: its header and its text."""
        document = self.documents[chunk.document]
        start, end = document.characters(chunk.start, chunk.end)
        return chunk.header + document.document.text[start:end]


def tokenize_corpus(corpus: Corpus, tokenizer: OffsetTokenizer, *, max_tokens: int = 0) -> TokenizedCorpus:
    """Tokenises every document once.

    Args:
      max_tokens: each document is cut at the last sentence end within that many tokens; 0 keeps all. Questions that
        came with a document are kept where all of their answers are in the text that is kept.

    Raises:
      UserError: a first sentence that exceeds `max_tokens`.
    """
    if max_tokens < 0:
        raise UserError(f"max_tokens={max_tokens}: must be 0 (all) or more")
    documents = tuple(_tokenized(document, tokenizer, max_tokens) for document in corpus)
    return TokenizedCorpus(Corpus(tuple(document.document for document in documents)), documents)


def _tokenized(document: Document, tokenizer: OffsetTokenizer, max_tokens: int) -> TokenizedDocument:
    ids, offsets = tokenizer.encode_with_offsets(document.text)
    if not ids:
        raise UserError(f"the document {document.name!r} is empty: leave it out")
    if max_tokens and len(ids) > max_tokens:
        # The first character that no longer fits.
        limit = offsets[max_tokens][0]
        ends = [sentence.end for sentence in split_sentences(document.text) if sentence.end <= limit]
        # A prefix may take a token more than it does inside the whole text: merges over the cut are lost.
        while ends and len(tokenizer.encode(document.text[: ends[-1]])) > max_tokens:
            ends.pop()
        if not ends:
            raise UserError(f"max_tokens={max_tokens} does not hold the first sentence of {document.name!r}: raise it")
        text = document.text[: ends[-1]]
        questions = tuple(q for q in document.questions if all(end <= len(text) for _, end in q.spans))
        document = dataclasses.replace(document, text=text, questions=questions)
        ids, offsets = tokenizer.encode_with_offsets(text)
    return TokenizedDocument(document, np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2))
