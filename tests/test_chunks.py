"""The chunk sampler."""

import re

import numpy as np
import pytest

from cartridges_jax.corpus.chunks import Chunk, sample_chunks, token_coverage


def test_chunks_have_lengths_in_bounds_and_stay_in_the_document():
    chunks = sample_chunks([1000], 400, min_tokens=50, max_tokens=90, seed=1)
    lengths = [chunk.num_tokens for chunk in chunks]
    assert len(chunks) == 400 and min(lengths) == 50 and max(lengths) == 90  # both bounds are drawn
    assert all(0 <= chunk.start and chunk.end <= 1000 for chunk in chunks)


def test_chunks_cover_a_document_evenly_where_uniform_starts_would_leave_holes():
    chunks = sample_chunks([10_000], 200, min_tokens=100, max_tokens=100, seed=3)
    assert token_coverage(chunks, [10_000]) == 1.0
    random_starts = np.random.default_rng(3).integers(0, 9901, size=200)
    assert token_coverage([Chunk(0, start, start + 100) for start in random_starts], [10_000]) < 0.95


def test_chunks_come_in_random_order_and_depend_on_the_seed_alone():
    chunks = sample_chunks([5000], 50, min_tokens=10, max_tokens=20, seed=7)
    assert chunks == sample_chunks([5000], 50, min_tokens=10, max_tokens=20, seed=7)
    assert chunks != sample_chunks([5000], 50, min_tokens=10, max_tokens=20, seed=8)
    starts = [chunk.start for chunk in chunks]
    assert starts != sorted(starts)


def test_chunks_stay_within_their_document_and_cover_documents_by_their_length(rng):
    sizes = [400, 3, 97, 1500]
    chunks = sample_chunks(sizes, 2000, min_tokens=20, max_tokens=60, seed=int(rng.integers(2**31)))
    counts = np.bincount([chunk.document for chunk in chunks], minlength=4)
    np.testing.assert_allclose(counts / 2000, np.array(sizes) / sum(sizes), atol=2 / 2000)
    assert all(0 <= chunk.start < chunk.end <= sizes[chunk.document] for chunk in chunks)
    assert {(chunk.start, chunk.end) for chunk in chunks if chunk.document == 1} == {(0, 3)}


def test_a_document_shorter_than_a_chunk_is_the_chunk():
    assert sample_chunks([30], 3, min_tokens=50, max_tokens=90, seed=0) == [Chunk(0, 0, 30)] * 3


@pytest.mark.parametrize(
    "bad", [{"document_tokens": [0]}, {"num_chunks": -1}, {"min_tokens": 0}, {"min_tokens": 9, "max_tokens": 8}]
)
def test_chunk_sizes_that_make_no_sense_are_refused_with_their_values(bad):
    sizes = {"document_tokens": [100], "num_chunks": 3, "min_tokens": 5, "max_tokens": 8, "seed": 0} | bad
    with pytest.raises(ValueError, match=re.escape(str(next(iter(bad.values()))))):
        sample_chunks(sizes.pop("document_tokens"), sizes.pop("num_chunks"), **sizes)


def test_token_coverage_counts_a_token_once():
    assert token_coverage([Chunk(0, 0, 5), Chunk(0, 3, 6)], [10]) == 0.6
    assert token_coverage([], [10]) == 0.0
