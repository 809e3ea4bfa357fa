"""Rotary position embedding (Su et al., arXiv 2104.09864), halves layout.

The first and second half of a head form the rotated pairs, as in Hugging Face's
checkpoints; GGUF files store Llama's rows interleaved and are un-permuted on import.
"""
from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def rope_tables(positions: Array, head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines for integer positions.

    Args:
      positions: [B, T] int32.
      head_dim: H, even.
      base: the wavelength base ("theta").

    Returns:
      (cos, sin), each [B, T, H / 2] float32.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = positions[..., None].astype(jnp.float32) / (base**exponent)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates heads by their positions, in float32, and returns x's dtype.

    Args:
      x: [B, T, heads, H].
      cos: [B, T, H / 2].
      sin: [B, T, H / 2].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
