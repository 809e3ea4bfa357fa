"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_NUCLEUS_CANDIDATES = 512


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the draw of a token.

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


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kinds of draw that a batch needs; static, so that a greedy batch's program draws nothing.

    Attributes:
      candidates: how many tokens the rows with a top_k draw from; 0 without such rows.
      whole: a row draws from the whole vocabulary.
      nucleus: a row has a top_p below 1.
    """

    candidates: int = 0
    whole: bool = False
    nucleus: bool = False

    @classmethod
    def of(cls, settings: Iterable[Sampling]) -> Choice:
        """The choice that covers rows of these settings."""
        drawing = [sampling for sampling in settings if sampling.temperature > 0]
        top_k = max((sampling.top_k for sampling in drawing), default=0)
        return cls(
            # Few values, few programs; a row's draw does not depend on how many candidates follow its own.
            candidates=1 << (top_k - 1).bit_length() if top_k else 0,
            whole=any(not sampling.top_k for sampling in drawing),
            nucleus=any(sampling.top_p < 1 for sampling in drawing),
        )


@flax.struct.dataclass
class RowSampling:
    """`Sampling` of every row, as arrays.

    Attributes:
      temperature: [B] float32.
      top_k: [B] int32.
      top_p: [B] float32.
    """

    temperature: Array
    top_k: Array
    top_p: Array

    @classmethod
    def of(cls, settings: Sequence[Sampling]) -> RowSampling:
        """One row per settings; NumPy arrays."""
        return cls(
            np.asarray([sampling.temperature for sampling in settings], np.float32),
            np.asarray([sampling.top_k for sampling in settings], np.int32),
            np.asarray([sampling.top_p for sampling in settings], np.float32),
        )


def select_rows(logits: Array, keys: Array, rows: RowSampling, choice: Choice) -> Array:
    """Draws one token per row.

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys, one per row, so that a row's draw does not depend on the
        batch it is in. Unused when greedy.
      rows: each row's settings.
      choice: static; covers them.

    Returns:
      [B] int32.
    """
    greedy = most_likely(logits)
    if not (choice.candidates or choice.whole):
        return greedy
    logits = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    drawn = greedy
    if choice.whole:
        allowed = logits
        if choice.nucleus:
            limited = (rows.top_p < 1) & (rows.top_k == 0) & (rows.temperature > 0)
            floor = _nucleus_floor(logits, jnp.where(limited, rows.top_p, 0)[:, None])
            allowed = jnp.where((logits < floor[:, None]) & limited[:, None], -jnp.inf, logits)
        drawn = jax.vmap(jax.random.categorical)(keys, allowed)
    if choice.candidates:
        # Drawing among the k costs far less than random numbers for a whole vocabulary.
        values, ids = jax.lax.top_k(logits, min(choice.candidates, logits.shape[-1]))
        values = jnp.where(jnp.arange(values.shape[-1]) < rows.top_k[:, None], values, -jnp.inf)
        if choice.nucleus:
            inside = (_before(values, None) < rows.top_p[:, None]) | (rows.top_p == 1)[:, None]
            values = jnp.where(inside, values, -jnp.inf)
        place = jax.vmap(jax.random.categorical)(keys, values)
        drawn = jnp.where(rows.top_k > 0, jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0], drawn)
    return jnp.where(rows.temperature > 0, drawn, greedy).astype(jnp.int32)


def most_likely(logits: Array) -> Array:
    """The first of the largest logits in each row of [..., V]: [...] int32; V - 1 in a row with a NaN.

    `argmax` in two passes, each of which XLA's CPU backend vectorises; of argmax it makes a loop over single numbers.
    """
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(logits == logits.max(axis=-1, keepdims=True), ids, logits.shape[-1] - 1).min(axis=-1)


def _before(descending: Array, normaliser: Array | None) -> Array:
    """The probability of all entries before each entry of a descending row; [B, n]."""
    if normaliser is None:
        normaliser = jax.nn.logsumexp(descending, axis=-1, keepdims=True)
    probability = jnp.exp(descending - normaliser)
    return jnp.cumsum(probability, axis=-1) - probability


def _nucleus_floor(logits: Array, top_p: Array) -> Array:
    """The smallest logit [B] inside the nucleus (top_p [B, 1]; 0 is none) of each row of [B, V]."""
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def floor(descending: Array) -> tuple[Array, Array]:
        inside = _before(descending, normaliser) < top_p
        return jnp.where(inside, descending, jnp.inf).min(axis=-1), inside[:, -1]

    # Sorting a whole vocabulary costs more than the rest of a decode step; the nucleus
    # is nearly always among the few most likely tokens; the sort covers the rest.
    candidates = min(_NUCLEUS_CANDIDATES, logits.shape[-1])
    lowest, reaches_further = floor(jax.lax.top_k(logits, candidates)[0])
    return jax.lax.cond(
        jnp.any(reaches_further) & (candidates < logits.shape[-1]),
        lambda: floor(-jnp.sort(-logits, axis=-1))[0],
        lambda: lowest,
    )
