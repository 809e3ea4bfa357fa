"""Rotary position embedding (Su et al., arXiv 2104.09864), halves layout.

The first and second half of a head form the rotated pairs, as in Hugging Face's
checkpoints; GGUF files store Llama's rows interleaved and are un-permuted on import.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotation frequencies of a head's pairs.

    Every scaling that only lowers frequencies is a factor per pair, so one field represents
    Llama 3's, the linear one, and the factors that a GGUF file stores.

    Attributes:
      base: the wavelength base ("theta").
      factors: [H / 2], by how much each pair's wavelength is stretched; empty means 1
        for all.
      scale: factor of cosines and sines, hence its square that of the scores (YaRN).
      width: how many of a head's values are rotated, the first ones; 0 means all H. Where
        it is set there are `width / 2` pairs.
    """

    base: float
    factors: tuple[float, ...] = ()
    scale: float = 1.0
    width: int = 0


def linear_factors(head_dim: int, factor: float) -> tuple[float, ...]:
    """Position interpolation (arXiv 2306.15595): the same factor for all pairs."""
    return (float(factor),) * (head_dim // 2)


def llama3_factors(
    head_dim: int, base: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> tuple[float, ...]:
    """Llama 3.1's scaling (transformers' `_compute_llama3_parameters`).

    Pairs that rotate more than `high_freq_factor` times within the original context are
    unchanged; those that rotate fewer than `low_freq_factor` times are slowed by `factor`;
    between, the frequency is interpolated.
    """
    factors = []
    for pair in range(head_dim // 2):
        rotations = original_context / (2 * math.pi * base ** (2 * pair / head_dim))
        unchanged = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)
        unchanged = min(max(unchanged, 0.0), 1.0)
        factors.append(1 / ((1 - unchanged) / factor + unchanged))
    return tuple(factors)


def yarn_factors(
    width: int,
    base: float,
    factor: float,
    original_context: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[float, ...]:
    """YaRN (arXiv 2309.00071, section 3.2; transformers' `_compute_yarn_parameters`).

    Pairs that rotate more than `beta_fast` times within the original context are unchanged; those that rotate fewer
    than `beta_slow` times are slowed by `factor`; between, the frequency is interpolated along the pairs' numbers.

    Args:
      width: rotated values of a head.
      truncate: the two borders are whole pairs.
    """

    def pair_of(rotations: float) -> float:
        return width * math.log(original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    factors = []
    for pair in range(width // 2):
        slowed = min(max((pair - low) / (high - low), 0.0), 1.0)
        factors.append(1 / (slowed / factor + 1 - slowed))
    return tuple(factors)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor of cosines and sines (the root of its temperature)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, rope: Rope
) -> tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]]:
    """Cosines and sines for integer positions.

    Args:
      positions: [B, T] int32.
      head_dim: H, even.
      rope: base and factors.

    Returns:
      (cos, sin), each [B, T, H / 2] float32, or as wide as half of what is rotated.
    """
    width = rope.width or head_dim
    # In float32, as the models were trained: at position 100,000 a last bit is 0.006 radians.
    frequency = 1 / np.float32(rope.base) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    if rope.factors:
        frequency = frequency / np.asarray(rope.factors)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    if rope.scale == 1:
        return jnp.cos(angle), jnp.sin(angle)
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def rotate(
    x: Float[Array, "B T heads H"], cos: Float32[Array, "B T pairs"], sin: Float32[Array, "B T pairs"]
) -> Float[Array, "B T heads H"]:
    """Rotates heads by their positions, in float32, and returns x's dtype.

    Args:
      x: [B, T, heads, H].
      cos: [B, T, H / 2].
      sin: [B, T, H / 2].
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:  # the rest of a head has no positions
        return jnp.concatenate([rotate(x[..., :width], cos, sin), x[..., width:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
