"""The plan of a run: all chunks, and the sentences and seed families that A writes about.

The plan is a pure function of the corpus and the settings, so that a resumed run asks
for exactly what the interrupted one would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from cartridges_jax.corpus import Chunk, TokenizedCorpus
from cartridges_jax.corpus.chunks import sample_chunks
from cartridges_jax.errors import UserError
from cartridges_jax.selfstudy.seeds import FAMILIES
from cartridges_jax.selfstudy.streams import CHUNKS, REQUESTS, stream
from cartridges_jax.selfstudy.writer import Request


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """One chunk and the messages that A writes about it.

    Attributes:
      chunk: token range of a document.
      text: the chunk's text, with its header.
      requests: the messages to be written, in order.
    """

    chunk: Chunk
    text: str
    requests: list[Request]


def family_sequence(weights: Mapping[str, float], count: int, rng: np.random.Generator) -> list[str]:
    """Draws `count` family names in the proportions of `weights`, shuffled.

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
    """Draws chunks spread over the corpus, and for each the sentences that were asked about least.

    Raises:
      UserError: a corpus without a sentence, or bad family weights.
    """
    sentences = corpus.sentences
    if not sentences:
        raise UserError("the document has no sentence to ask about: give it text besides headings")
    chunks = sample_chunks(
        [document.num_tokens for document in corpus.documents],
        num_batches,
        min_tokens=chunk_min_tokens,
        max_tokens=chunk_max_tokens,
        seed=stream(seed, CHUNKS),
    )
    # Per sentence: its document, and the half-open span of its characters.
    documents = np.asarray([document for document, _ in sentences])
    begins = np.asarray([sentence.start for _, sentence in sentences])
    ends = np.asarray([sentence.end for _, sentence in sentences])
    asked = np.zeros(len(sentences), np.int64)
    batches = []
    for number, chunk in enumerate(chunks):
        rng = np.random.default_rng(stream(seed, number, REQUESTS))
        chunk = dataclasses.replace(chunk, header=corpus.header(chunk.document))
        start, end = corpus.documents[chunk.document].characters(chunk.start, chunk.end)
        own = documents == chunk.document
        inside = np.nonzero(own & (begins >= start) & (ends <= end))[0]
        if not len(inside):
            # A chunk shorter than a sentence asks about the one it cuts.
            inside = np.nonzero(own & (begins < end) & (ends > start))[0]
        requests = []
        if len(inside):
            names = family_sequence(families, requests_per_batch, rng)
            for family, (index, times) in zip(names, _least_asked(inside, asked, len(names), rng), strict=True):
                requests.append(Request(family, times + number, sentences[index][1].text, index))
        batches.append(BatchPlan(chunk, corpus.chunk_text(chunk), requests))
    return batches


def _least_asked(inside: np.ndarray, asked: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draws `count` times the sentence that was asked about least, a random one of several.

    Args:
      inside: [n] indices of the sentences to choose from.
      asked: how many times each sentence was asked about; updated.

    Returns:
      (index of the sentence, how many times it had been asked about).
    """
    before = asked[inside]
    # The draws fill the counts up like water: find the level that they reach.
    level = before.min() + 1
    while np.maximum(level - before, 0).sum() < count:
        level += 1
    places = np.repeat(np.arange(len(inside)), np.maximum(level - before, 0))
    times = np.concatenate([np.arange(low, level) for low in before if low < level])
    order = np.lexsort((rng.random(len(times)), times))[:count]
    np.add.at(asked, inside[places[order]], 1)
    return list(zip(inside[places[order]].tolist(), times[order].tolist(), strict=True))
