"""Context distillation on stored top-k targets (paper section 4.2).

For every target token the student's distribution q is drawn to the teacher's p. Only
the teacher's k most likely tokens are stored, so both are compared on k + 1 classes:
those tokens, and everything else (`tail="class"`, the default: a proper KL on the
coarsened distributions). `tail="drop"` is the paper's plain form: the sum runs over the
k stored tokens alone.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

TAILS = ("class", "drop")

# Probability below which the rest is not told from zero in float32.
_SMALLEST_REST = 1e-6


def _rest_logprob(logprobs: Array, stored: Array) -> Array:
    """log(1 - sum of the stored probabilities), [M]."""
    total = jnp.sum(jnp.where(stored, jnp.exp(logprobs), 0.0), axis=-1)
    return jnp.log(jnp.maximum(1.0 - total, _SMALLEST_REST))


def divergence_per_token(logits: Array, ids: Array, logprobs: Array, tail: str = "class") -> Array:
    """KL(teacher || student) of every target row, in nats.

    All k entries count, however little mass they carry together: rows of high entropy
    are where the knowledge is.

    Args:
      logits: [M, V] float32, the student's.
      ids: [M, k] int32, the teacher's most likely tokens, distinct within a row.
      logprobs: [M, k] float32, their log-probabilities; -inf marks an unused entry.
      tail: "class" or "drop".

    Returns:
      [M] float32.
    """
    if tail not in TAILS:
        raise ValueError(f"tail {tail!r} is not one of {TAILS}")
    stored = jnp.isfinite(logprobs)
    teacher = jnp.where(stored, logprobs, 0.0)
    probability = jnp.where(stored, jnp.exp(teacher), 0.0)
    student = jnp.take_along_axis(logits, ids, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    divergence = jnp.sum(probability * (teacher - student), axis=-1)
    if tail == "class":
        rest = _rest_logprob(teacher, stored)
        divergence += jnp.exp(rest) * (rest - _rest_logprob(student, stored))
    return divergence
