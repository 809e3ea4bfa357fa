"""Choosing the next token from logits."""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

_NUCLEUS_CANDIDATES = 512


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: 0 takes the most likely token; else the logits are divided by it.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches it (nucleus
        sampling, arXiv 1904.09751); 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be in (0, 1]")


GREEDY = Sampling()


def select_tokens(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """Draws one token per row.

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys, one per row, so that a row's draw does not depend on the
        batch it is in. Unused when greedy.
      sampling: static settings.

    Returns:
      [B] int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        # Drawing among the k costs far less than random numbers for a whole vocabulary.
        candidates, ids = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
        if sampling.top_p < 1:
            candidates = jnp.where(_before(candidates, None) < sampling.top_p, candidates, -jnp.inf)
        drawn = jax.vmap(jax.random.categorical)(keys, candidates)
        return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
    if sampling.top_p < 1:
        logits = jnp.where(logits < _nucleus_floor(logits, sampling.top_p)[:, None], -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _before(descending: Array, normaliser: Array | None) -> Array:
    """Probability of all that stands before each entry of a descending row; [B, n]."""
    if normaliser is None:
        normaliser = jax.nn.logsumexp(descending, axis=-1, keepdims=True)
    probability = jnp.exp(descending - normaliser)
    return jnp.cumsum(probability, axis=-1) - probability


def _nucleus_floor(logits: Array, top_p: float) -> Array:
    """The smallest logit [B] inside the nucleus of each row of [B, V]."""
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def floor(descending: Array) -> tuple[Array, Array]:
        inside = _before(descending, normaliser) < top_p
        return jnp.where(inside, descending, jnp.inf).min(axis=-1), inside[:, -1]

    # Sorting a whole vocabulary costs more than the rest of a decode step; the nucleus
    # nearly always lies within the few most likely tokens, and the sort is for when not.
    candidates = min(_NUCLEUS_CANDIDATES, logits.shape[-1])
    lowest, reaches_further = floor(jax.lax.top_k(logits, candidates)[0])
    return jax.lax.cond(
        jnp.any(reaches_further) & (candidates < logits.shape[-1]),
        lambda: floor(-jnp.sort(-logits, axis=-1))[0],
        lambda: lowest,
    )
