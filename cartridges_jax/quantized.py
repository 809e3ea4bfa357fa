"""Frozen weights in 8 bits, and the one product that all weights are reached through.

A quantised matrix holds an integer per weight and a scale per output channel (the
symmetric per-channel scheme of LLM.int8(), arXiv 2208.07339, without its outliers). The
weights of a cartridge's model are never trained, so the rounding happens once; gradients
flow through the products to the activations.
"""
from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_LARGEST = 127


@flax.struct.dataclass
class Quantized:
    """A matrix as integers and scales.

    Attributes:
      values: int8, the matrix's shape.
      scale: the matrix's shape without the axis that is summed over, in the dtype that
        is computed in.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """What the matrix acts as: the dtype of the scales."""
        return self.scale.dtype


def channel_scale(weight: np.ndarray) -> np.ndarray:
    """The scale of every channel, float32: its largest weight becomes 127.

    Args:
      weight: [channels, summed over].
    """
    largest = np.abs(weight.astype(np.float32)).max(axis=1)
    return np.where(largest > 0, largest, 1.0).astype(np.float32) / _LARGEST


def linear(x: Array, weight: Array | Quantized) -> Array:
    """x [..., in] times weight [in, out], in x's dtype."""
    if isinstance(weight, Quantized):
        return jnp.einsum("...i,io->...o", x, weight.values.astype(x.dtype)) * weight.scale
    return jnp.einsum("...i,io->...o", x, weight)


def rows(table: Array | Quantized, indices: Array) -> Array:
    """Rows [..., D] of a table [V, D] whose channels are its rows."""
    if isinstance(table, Quantized):
        return table.values[indices].astype(table.dtype) * table.scale[indices][..., None]
    return table[indices]


def linear_rows(x: Array, table: Array | Quantized) -> Array:
    """x [..., D] times the rows of table [V, D]: [..., V], accumulated in float32.

    The product as `nd,vd->nv` beats one with a transposed copy of the table.
    """
    if isinstance(table, Quantized):
        product = jnp.einsum("...d,vd->...v", x, table.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return product * table.scale.astype(jnp.float32)
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


def mix_rows(weights: Array, table: Array | Quantized) -> Array:
    """weights [..., V] times table [V, D]: a weighted sum of its rows, accumulated in float32.

    The transpose of `linear_rows`.
    """
    if isinstance(table, Quantized):
        weights = weights * table.scale.astype(weights.dtype)
        table = table.values.astype(weights.dtype)
    return jnp.einsum("...v,vd->...d", weights, table, preferred_element_type=jnp.float32)


def num_bytes(params: Any) -> int:
    """Bytes that a tree of weights takes, in the dtypes that are stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
