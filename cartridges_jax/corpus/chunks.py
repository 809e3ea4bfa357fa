"""Chunks: the spans of a document that self-study shows to the teacher (section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """The half-open token span `[start, end)` of a document."""

    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


def sample_chunks(num_tokens: int, num_chunks: int, *, min_tokens: int, max_tokens: int, seed: int) -> list[Chunk]:
    """Draws chunks of uniform length, spread evenly over the document.

    The paper draws start and length uniformly. Two things differ here, so that few chunks cover a document evenly:
    positions are stratified (one uniform draw in each of `num_chunks` equal strata, in random order), and a position is
    the *middle* of its chunk, moved inwards at the edges: a uniform start would all but never show the first tokens.

    Args:
      num_tokens: length of the document, in tokens.
      num_chunks: how many chunks to draw.
      min_tokens, max_tokens: bounds of the uniform length, both included; a document shorter than a drawn length is
        that chunk.
      seed: of the PCG64 generator; equal seeds give equal chunks.

    Raises:
      ValueError: if the document is empty, or the bounds or the count make no sense.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; there is nothing to draw chunks from")
    if num_chunks < 0:
        raise ValueError(f"num_chunks is {num_chunks}; it must be 0 or more")
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"min_tokens = {min_tokens} and max_tokens = {max_tokens}; need 1 <= min_tokens <= max_tokens")

    random = np.random.Generator(np.random.PCG64(seed))
    lengths = np.minimum(random.integers(min_tokens, max_tokens, size=num_chunks, endpoint=True), num_tokens)
    middles = (random.permutation(num_chunks) + random.random(num_chunks)) / max(num_chunks, 1) * num_tokens
    starts = np.clip(np.floor(middles - lengths / 2).astype(np.int64), 0, num_tokens - lengths)
    return [Chunk(int(start), int(start + length)) for start, length in zip(starts, lengths)]


def token_coverage(chunks: Sequence[Chunk], num_tokens: int) -> float:
    """The fraction of the document's tokens that lie in at least one chunk, in [0, 1]."""
    seen = np.zeros(num_tokens, dtype=bool)
    for chunk in chunks:
        seen[chunk.start : chunk.end] = True
    return float(seen.mean()) if num_tokens else 0.0
