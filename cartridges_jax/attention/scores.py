"""The score functions that all implementations share."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

# Finite, so that a masked score minus the maximum never becomes inf - inf.
MASKED = -1e30


def capped(scores: Array, softcap: float) -> tuple[Array, Array | float]:
    """Scores bounded as c * tanh(score / c), and the slope of that; c = 0 leaves them.

    Gemma 2, arXiv 2408.00118.
    """
    if not softcap:
        return scores, 1.0
    bounded = jnp.tanh(scores / softcap)
    return softcap * bounded, 1.0 - bounded**2
