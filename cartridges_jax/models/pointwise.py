"""Elementwise functions and norms between a layer's products.

The backward pass recomputes them from the products' results, which are stored anyway: no
slower on a CPU than storing the values in between, and far less memory.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}


# The layers are scanned, which keeps the compiler from merging both computations.
@functools.partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)
def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=(0,), prevent_cse=False)
def gated(activation: str, gate: Array, up: Array) -> Array:
    """activation(gate) * up, all [..., F]."""
    return _ACTIVATIONS[activation](gate) * up
