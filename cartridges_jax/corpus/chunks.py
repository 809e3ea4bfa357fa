"""Chunks: the spans of documents that self-study shows to the teacher (section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """The half-open token span `[start, end)` of a document.

    Attributes:
      document: index of the document in its corpus.
      start, end: tokens of the document.
      header: text shown before the chunk, which says where it comes from.
    """

    document: int
    start: int
    end: int
    header: str = ""

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


def sample_chunks(
    document_tokens: Sequence[int],
    num_chunks: int,
    *,
    min_tokens: int,
    max_tokens: int,
    seed: int | np.random.SeedSequence,
) -> list[Chunk]:
    """Draws chunks of uniform length, spread evenly over the documents by their tokens.

    The paper draws start and length uniformly. Two things differ here, so that few chunks cover a corpus evenly:
    positions are stratified (one uniform draw in each of `num_chunks` equal strata, in random order), and a position is
    the *middle* of its chunk, moved inwards at the edges: a uniform start would all but never show the first tokens.

    Args:
      document_tokens: length of every document, in tokens.
      num_chunks: how many chunks to draw.
      min_tokens, max_tokens: bounds of the uniform length, both included; a document shorter than a drawn length is
        that chunk.
      seed: of the PCG64 generator; equal seeds give equal chunks.

    Returns:
      Chunks without headers.

    Raises:
      ValueError: an empty corpus or document, or bounds or a count that make no sense.
    """
    sizes = np.asarray(document_tokens, np.int64)
    if not len(sizes) or sizes.min() < 1:
        raise ValueError(f"document_tokens is {list(document_tokens)}; there is nothing to draw chunks from")
    if num_chunks < 0:
        raise ValueError(f"num_chunks is {num_chunks}; it must be 0 or more")
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"min_tokens = {min_tokens} and max_tokens = {max_tokens}; need 1 <= min_tokens <= max_tokens")

    random = np.random.Generator(np.random.PCG64(seed))
    ends = np.cumsum(sizes)
    drawn = random.integers(min_tokens, max_tokens, size=num_chunks, endpoint=True)
    middles = (random.permutation(num_chunks) + random.random(num_chunks)) / max(num_chunks, 1) * ends[-1]
    documents = np.minimum(np.searchsorted(ends, middles, side="right"), len(sizes) - 1)
    lengths = np.minimum(drawn, sizes[documents])
    within = middles - (ends - sizes)[documents]
    starts = np.clip(np.floor(within - lengths / 2).astype(np.int64), 0, sizes[documents] - lengths)
    return [
        Chunk(int(document), int(start), int(start + length))
        for document, start, length in zip(documents, starts, lengths)
    ]


def token_coverage(chunks: Sequence[Chunk], document_tokens: Sequence[int]) -> float:
    """The fraction of the documents' tokens that are in at least one chunk, in [0, 1]."""
    seen = [np.zeros(size, dtype=bool) for size in document_tokens]
    for chunk in chunks:
        seen[chunk.document][chunk.start : chunk.end] = True
    return float(np.concatenate(seen).mean()) if sum(document_tokens) else 0.0
