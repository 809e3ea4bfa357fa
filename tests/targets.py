"""Random teachers, as the tests of the loss and of the step draw them."""

from __future__ import annotations

import numpy as np


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def random_targets(rng, num_rows, vocab_size, k, scale=2.0):
    """A teacher's (all log-probabilities float64, its k most likely ids, theirs float32)."""
    teacher = log_softmax(scale * rng.standard_normal((num_rows, vocab_size)))
    ids = np.argsort(-teacher, axis=-1)[:, :k].astype(np.int32)
    return teacher, ids, np.take_along_axis(teacher, ids, axis=-1).astype(np.float32)
