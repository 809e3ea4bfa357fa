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

# A teacher's remaining probability below this is rounding of the stored values.
_ROUNDING = 1e-6
# Takes a logit out of a sum of exponentials; finite, so that its gradient stays finite.
_EXCLUDED = -1e30


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
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    # The rest is summed over its own logits: one minus the sum of the k would lose its
    # value, and its gradient, where the student is sure of the k.
    rows = jnp.arange(logits.shape[0])[:, None]
    exclusion = jnp.zeros_like(logits).at[rows, ids].min(jnp.where(stored, _EXCLUDED, 0.0))
    rest = jax.nn.logsumexp(logits + exclusion, axis=-1)
    normaliser = jnp.logaddexp(rest, jax.nn.logsumexp(jnp.where(stored, chosen, _EXCLUDED), axis=-1))
    divergence = jnp.sum(probability * (teacher - (chosen - normaliser[:, None])), axis=-1)
    if tail == "class":
        remaining = 1.0 - jnp.sum(probability, axis=-1)
        remaining = jnp.where(remaining > _ROUNDING, remaining, 0.0)
        log_remaining = jnp.log(jnp.where(remaining > 0, remaining, 1.0))
        divergence += jnp.where(remaining > 0, remaining * (log_remaining - (rest - normaliser)), 0.0)
    return divergence
