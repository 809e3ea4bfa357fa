"""The KV prefix: everything that precedes a conversation.

A chunk in a teacher's context, a whole document, a thinned cache and a trained
cartridge are all this one pytree (Cartridges, arXiv 2506.06266, section 3.2: "a
cartridge is a KV cache of p tokens"). It has no batch axis: the rows of a batch
share it.

Axis legend of the whole package: B rows, T tokens, P prefix slots, S cache slots,
L layers, D model width, N query heads, K key/value heads, G = N / K, H head width,
V vocabulary, M target rows, k teacher entries.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct

# The bias of a slot that no token sees. Finite, so that a score minus the maximum never becomes inf - inf; its
# exponential is exactly 0.
HIDDEN = -1e30


@flax.struct.dataclass
class KVPrefix:
    """Keys and values of P slots in every layer.

    All fields are array leaves: prefixes of the same P share a compiled program whatever
    their `next_position`, and `jax.tree.map(jnp.stack, …)` stacks them.

    Attributes:
      keys: [L, K, P, H], stored after RoPE (and any key norm); never rotated again. Where a
        CPU decodes, a tuple of L arrays [K, P, H] (see `unstacked`).
      values: as `keys`, in the same dtype.
      positions: [P] int32, the position at which each slot's key was rotated.
      next_position: [] int32, the position of the first token after the prefix; the
        decoder adds it to the positions of a conversation.
      bias: optional [L, K, P] float32 additive attention logit; None means 0.
    """

    keys: Float[Array, "L K P H"] | tuple[Float[Array, "K P H"], ...]
    values: Float[Array, "L K P H"] | tuple[Float[Array, "K P H"], ...]
    positions: Int32[Array, " P"]
    next_position: Int32[Array, ""]
    bias: Float32[Array, "L K P"] | None = None

    @property
    def num_slots(self) -> int:
        """P, the number of slots."""
        return jax.tree.leaves(self.keys)[0].shape[-2]

    @property
    def num_layers(self) -> int:
        return len(self.keys) if isinstance(self.keys, tuple) else self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the live slots in their stored dtype, bias included."""
        parts = jax.tree.leaves((self.keys, self.values, self.bias))
        return sum(int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for x in parts)

    def astype(self, dtype: Any) -> KVPrefix:
        """This prefix with keys and values stored as `dtype`."""
        keys, values = jax.tree.map(lambda part: part.astype(dtype), (self.keys, self.values))
        return self.replace(keys=keys, values=values)

    def unstacked(self) -> KVPrefix:
        """This prefix with keys and values as tuples of the layers' arrays."""
        return self.replace(keys=tuple(self.keys), values=tuple(self.values))


# Logical names of the arrays' axes (see `parallel.rules`).
PREFIX_AXES = {
    "keys": ("layers", "kv_heads", "slots", None),
    "values": ("layers", "kv_heads", "slots", None),
    "positions": (None,),
    "next_position": (),
    "bias": ("layers", "kv_heads", "slots"),
}


def from_plain_tokens(keys: Float[Array, "L K P H"], values: Float[Array, "L K P H"]) -> KVPrefix:
    """A prefix whose slots are plain tokens at positions 0..P-1.

    Args:
      keys: [L, K, P, H].
      values: [L, K, P, H].
    """
    num_slots = keys.shape[2]
    return KVPrefix(
        keys=keys,
        values=values,
        positions=jnp.arange(num_slots, dtype=jnp.int32),
        next_position=jnp.asarray(num_slots, jnp.int32),
    )


def slice_slots(prefix: KVPrefix, start: int, stop: int) -> KVPrefix:
    """Slots start..stop-1, with their positions; `next_position` is unchanged."""
    if not 0 <= start < stop <= prefix.num_slots:
        raise ValueError(
            f"slots {start}..{stop} of a prefix of {prefix.num_slots}: need 0 <= start < stop <= the number of slots"
        )
    return prefix.replace(
        keys=prefix.keys[:, :, start:stop],
        values=prefix.values[:, :, start:stop],
        positions=prefix.positions[start:stop],
        bias=None if prefix.bias is None else prefix.bias[:, :, start:stop],
    )


def pad_slots(prefix: KVPrefix, num_slots: int) -> KVPrefix:
    """The prefix with slots appended that no token sees, so that prefixes of unlike P share a program.

    Args:
      num_slots: P of the result, at least that of `prefix`.

    Returns:
      A prefix with a bias, `HIDDEN` in the new slots; `prefix` itself if it has that many slots.
    """
    extra = num_slots - prefix.num_slots
    if not extra:
        return prefix
    slots = ((0, 0), (0, 0), (0, extra))
    bias = jnp.zeros(prefix.keys.shape[:3], jnp.float32) if prefix.bias is None else prefix.bias
    return prefix.replace(
        keys=jnp.pad(prefix.keys, (*slots, (0, 0))),
        values=jnp.pad(prefix.values, (*slots, (0, 0))),
        positions=jnp.pad(prefix.positions, (0, extra)),
        bias=jnp.pad(bias, slots, constant_values=HIDDEN),
    )


def compose(*prefixes: KVPrefix) -> KVPrefix:
    """Several prefixes as one: concatenation along P (paper section 5.4).

    Keys stay as they were rotated, so the parts overlap in position; `next_position` is
    the sum of the parts'.

    Raises:
      ValueError: no prefix given, or shapes or dtypes that do not belong to one model.
    """
    if not prefixes:
        raise ValueError("compose needs at least one prefix")

    def signature(prefix: KVPrefix) -> tuple:
        num_layers, num_kv_heads, _, head_dim = prefix.keys.shape
        return num_layers, num_kv_heads, head_dim, jnp.dtype(prefix.keys.dtype).name

    first = prefixes[0]
    for other in prefixes[1:]:
        if signature(other) != signature(first):
            raise ValueError(
                "prefixes of different models cannot be composed: (layers, kv heads, "
                f"head width, dtype) {signature(first)} against {signature(other)}"
            )
    bias = None
    if any(p.bias is not None for p in prefixes):
        bias = jnp.concatenate(
            [jnp.zeros(p.keys.shape[:3], jnp.float32) if p.bias is None else p.bias for p in prefixes],
            axis=2,
        )
    return KVPrefix(
        keys=jnp.concatenate([p.keys for p in prefixes], axis=2),
        values=jnp.concatenate([p.values for p in prefixes], axis=2),
        positions=jnp.concatenate([p.positions for p in prefixes]),
        next_position=jnp.asarray(sum(p.next_position for p in prefixes), jnp.int32),
        bias=bias,
    )
