"""The KV prefix: what stands in front of a conversation.

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

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct


@flax.struct.dataclass
class KVPrefix:
    """Keys and values of P slots in every layer.

    Attributes:
      keys: [L, K, P, H], stored after RoPE (and any key norm); never rotated again.
      values: [L, K, P, H], same dtype as `keys`.
      positions: [P] int32, the position at which each slot's key was rotated.
      group: [P] int32, which source a slot came from (all 0 unless composed).
      bias: optional [L, K, P] float32 additive attention logit; None means 0.
      next_position: the position of the first token behind the prefix.
    """

    keys: Array
    values: Array
    positions: Array
    group: Array
    bias: Array | None = None
    next_position: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def num_slots(self) -> int:
        """P, the number of slots."""
        return self.keys.shape[2]

    @property
    def num_layers(self) -> int:
        return self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the live slots in their stored dtype, bias included."""
        parts = [self.keys, self.values] + ([] if self.bias is None else [self.bias])
        return sum(int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for x in parts)

    def astype(self, dtype: Any) -> KVPrefix:
        """The same prefix with keys and values stored as `dtype`."""
        return self.replace(keys=self.keys.astype(dtype), values=self.values.astype(dtype))


# Logical names of the arrays' axes (see `parallel.rules`).
PREFIX_AXES = {
    "keys": ("layers", "kv_heads", "slots", None),
    "values": ("layers", "kv_heads", "slots", None),
    "positions": (None,),
    "group": (None,),
    "bias": ("layers", "kv_heads", "slots"),
}


def from_plain_tokens(keys: Array, values: Array) -> KVPrefix:
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
        group=jnp.zeros((num_slots,), jnp.int32),
        next_position=num_slots,
    )


def slice_slots(prefix: KVPrefix, start: int, stop: int) -> KVPrefix:
    """Slots start..stop-1, with their positions and `next_position` kept."""
    if not 0 <= start < stop <= prefix.num_slots:
        raise ValueError(
            f"slots {start}..{stop} of a prefix of {prefix.num_slots}: need 0 <= start < stop <= the number of slots"
        )
    return prefix.replace(
        keys=prefix.keys[:, :, start:stop],
        values=prefix.values[:, :, start:stop],
        positions=prefix.positions[start:stop],
        group=prefix.group[start:stop],
        bias=None if prefix.bias is None else prefix.bias[:, :, start:stop],
    )


def compose(*prefixes: KVPrefix) -> KVPrefix:
    """Several prefixes as one: concatenation along P (paper section 5.4).

    Keys stay as they were rotated, so the parts overlap in position; `group` keeps
    the parts apart, and `next_position` is the sum of the parts'.

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
    groups, offset = [], 0
    for prefix in prefixes:
        groups.append(prefix.group + offset)
        offset += int(np.max(prefix.group)) + 1
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
        group=jnp.concatenate(groups),
        bias=bias,
        next_position=sum(p.next_position for p in prefixes),
    )
