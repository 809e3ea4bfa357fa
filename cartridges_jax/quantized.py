"""Frozen weights in 8 or 16 bits, and the one product that all weights are reached through.

A quantised matrix holds an integer per weight and a scale per output channel (the
symmetric per-channel scheme of LLM.int8(), arXiv 2208.07339, without its outliers). A
narrow one holds bfloat16 under a float32 model, for CPUs with instructions for it. The
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
        """The dtype that products treat the matrix as: that of the scales."""
        return self.scale.dtype


@flax.struct.dataclass
class Narrow:
    """A matrix in bfloat16 that acts as one in float32.

    Its products are of bfloat16 numbers and summed in float32, in both directions; all
    else of the model stays float32.

    Attributes:
      bits: the matrix's shape; uint16, because XLA's CPU backend turns bfloat16 arrays to
        float32 before it slices or gathers from them. Where nothing does, bfloat16: then
        no product has to copy it.
    """

    bits: Array

    @property
    def values(self) -> Array:
        """The weights as bfloat16."""
        return self.bits if self.bits.dtype == jnp.bfloat16 else jax.lax.bitcast_convert_type(self.bits, jnp.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def dtype(self) -> Any:
        """The dtype that products treat the matrix as."""
        return jnp.dtype(jnp.float32)


Matrix = Array | Quantized | Narrow


def channel_scale(weight: np.ndarray) -> np.ndarray:
    """The scale of every channel, float32: its largest weight becomes 127.

    Args:
      weight: [channels, summed over].
    """
    largest = np.abs(weight.astype(np.float32)).max(axis=1)
    return np.where(largest > 0, largest, 1.0).astype(np.float32) / _LARGEST


def linear(x: Array, weight: Matrix) -> Array:
    """x [..., in] times weight [in, out], in x's dtype."""
    if isinstance(weight, Quantized):
        return jnp.einsum("...i,io->...o", x, weight.values.astype(x.dtype)) * weight.scale
    if isinstance(weight, Narrow):
        return _narrow_product(x, weight.bits)
    return jnp.einsum("...i,io->...o", x, weight)


def rows(table: Matrix, indices: Array) -> Array:
    """Rows [..., D] of a table [V, D] whose channels are its rows."""
    if isinstance(table, Quantized):
        return table.values[indices].astype(table.dtype) * table.scale[indices][..., None]
    if isinstance(table, Narrow):
        return Narrow(table.bits[indices]).values.astype(table.dtype)
    return table[indices]


def linear_rows(x: Array, table: Matrix) -> Array:
    """x [..., D] times the rows of table [V, D]: [..., V], accumulated in float32.

    The product as `nd,vd->nv` beats one with a transposed copy of the table.
    """
    if isinstance(table, Quantized):
        product = jnp.einsum("...d,vd->...v", x, table.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return product * table.scale.astype(jnp.float32)
    if isinstance(table, Narrow):
        return _summed("...d,vd->...v", x, table.bits)
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


def mix_rows(weights: Array, table: Matrix) -> Array:
    """weights [..., V] times table [V, D]: a weighted sum of its rows, accumulated in float32.

    The transpose of `linear_rows`.
    """
    if isinstance(table, Quantized):
        weights = weights * table.scale.astype(weights.dtype)
        table = table.values.astype(weights.dtype)
    if isinstance(table, Narrow):
        return _summed("...v,vd->...d", weights, table.bits)
    return jnp.einsum("...v,vd->...d", weights, table, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _narrow_product(x: Array, bits: Array) -> Array:
    """x [..., in] times a narrow [in, out]; the gradient that JAX derives would be a float32 product."""
    return _summed("...i,io->...o", x, bits)


def _narrow_backward(bits: Array, upstream: Array) -> tuple[Array, None]:
    return _summed("...o,io->...i", upstream, bits), None


_narrow_product.defvjp(lambda x, bits: (_narrow_product(x, bits), bits), _narrow_backward)


def _summed(product: str, x: Array, bits: Array) -> Array:
    """A product with a narrow matrix, summed in float32."""
    narrow = x.astype(jnp.bfloat16)
    lonely = x.size == x.shape[-1]
    if lonely:
        # XLA's CPU backend has no such kernel for a single row; what it takes is ten times slower than two rows.
        narrow = jnp.concatenate([narrow.reshape(1, -1)] * 2)
    out = jnp.einsum(product, narrow, Narrow(bits).values, preferred_element_type=jnp.float32)
    return out[:1].reshape(*x.shape[:-1], -1) if lonely else out


def num_bytes(params: Any) -> int:
    """Bytes that a tree of weights takes, in the dtypes that are stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
