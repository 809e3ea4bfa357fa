"""What will be asked, before the model writes a word.

The plan is a pure function of the document and the settings, so that a resumed run asks
exactly what the interrupted one would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from cartridges_jax.corpus import Chunk, TokenizedCorpus
from cartridges_jax.corpus.chunks import sample_chunks
from cartridges_jax.errors import UserError
from cartridges_jax.selfstudy.seeds import FAMILIES
from cartridges_jax.selfstudy.writer import Request


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """One chunk and the messages that A writes about it.

    Attributes:
      chunk: token range of the document.
      text: the chunk's text.
      requests: what is written, in order.
    """

    chunk: Chunk
    text: str
    requests: list[Request]


def family_sequence(weights: Mapping[str, float], count: int, rng: np.random.Generator) -> list[str]:
    """`count` family names in the proportions of `weights`, shuffled.

    Raises:
      UserError: an unknown family, or weights that are not positive.
    """
    for name, weight in weights.items():
        if name not in FAMILIES:
            raise UserError(f"seed family {name!r}: choose among {', '.join(FAMILIES)}")
        if not weight >= 0:
            raise UserError(f"seed family {name} has weight {weight}: it must be 0 or more")
    total = sum(weights.values())
    if not total > 0:
        raise UserError("all seed families have weight 0: give at least one a positive weight")
    borders = np.cumsum([weight / total for weight in weights.values()])
    # Evenly spaced draws keep the proportions exact in every batch.
    places = (np.arange(count) + rng.random()) / count
    names = list(weights)
    sequence = [names[min(int(np.searchsorted(borders, place, side="right")), len(names) - 1)] for place in places]
    return [sequence[i] for i in rng.permutation(count)]


def plan_batches(
    corpus: TokenizedCorpus,
    *,
    num_batches: int,
    requests_per_batch: int,
    chunk_min_tokens: int,
    chunk_max_tokens: int,
    families: Mapping[str, float],
    seed: int,
) -> list[BatchPlan]:
    """Chunks spread over the document, and for each the sentences that were asked about least.

    Raises:
      UserError: a document without a sentence, or bad family weights.
    """
    sentences = corpus.sentences
    if not sentences:
        raise UserError("the document has no sentence to ask about: give it text besides headings")
    chunks = sample_chunks(
        [document.num_tokens for document in corpus.documents],
        num_batches,
        min_tokens=chunk_min_tokens,
        max_tokens=chunk_max_tokens,
        seed=seed,
    )
    asked = np.zeros(len(sentences), np.int64)
    batches = []
    for number, chunk in enumerate(chunks):
        rng = np.random.default_rng([seed, number])
        chunk = dataclasses.replace(chunk, header=corpus.header(chunk.document))
        start, end = corpus.documents[chunk.document].characters(chunk.start, chunk.end)
        own = [(i, s) for i, (document, s) in enumerate(sentences) if document == chunk.document]
        inside = [i for i, s in own if start <= s.start and s.end <= end]
        # A chunk shorter than a sentence asks about the one it cuts.
        inside = inside or [i for i, s in own if s.start < end and s.end > start]
        requests = []
        for family in family_sequence(families, requests_per_batch, rng):
            if not inside:
                break
            index = min(inside, key=lambda i: (asked[i], rng.random()))
            requests.append(Request(family, int(asked[index]) + number, sentences[index][1].text, index))
            asked[index] += 1
        batches.append(BatchPlan(chunk, corpus.chunk_text(chunk), requests))
    return batches
