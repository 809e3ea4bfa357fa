"""Transfers between the host and the devices of a mesh.

Every process holds the same host values and gives its own devices their parts, so that
nothing here needs to reach all devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cartridges_jax.cartridge import PREFIX_AXES, KVPrefix
from cartridges_jax.parallel.rules import sharding


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of an array that every device has all of; None (the default device) without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def place(tree: Any, shardings: Any) -> Any:
    """Arrays on their devices.

    Args:
      tree: of NumPy arrays, the same on every process, or JAX arrays.
      shardings: of the same structure.
    """
    return jax.tree.map(_place, tree, shardings)


def _place(value: Any, where: NamedSharding) -> Array:
    if isinstance(value, jax.Array) and (where.is_fully_addressable or not value.is_fully_addressable):
        return jax.device_put(value, where)
    # An array of this process alone, or NumPy's: every process has the same, and JAX need not compare them.
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that every device has all of; on the default device without a mesh."""
    where = everywhere(mesh)
    return jax.device_put(tree) if where is None else jax.tree.map(lambda value: _place(value, where), tree)


def place_prefix(prefix: KVPrefix, mesh: Mesh | None, *, in_use: bool = False) -> KVPrefix:
    """A prefix on the mesh; as it is without one.

    Key/value heads are split over tensor and, at rest, slots over fsdp.
    """
    if mesh is None:
        return prefix
    shardings = prefix_shardings(mesh, prefix, in_use=in_use)
    return prefix.replace(**{name: _place(getattr(prefix, name), where) for name, where in shardings.items()})


def prefix_shardings(mesh: Mesh, prefix: KVPrefix, *, in_use: bool = False) -> dict[str, NamedSharding]:
    """Field to its sharding, for the fields that a prefix has."""
    parts = {name: getattr(prefix, name) for name in PREFIX_AXES}
    return {
        name: sharding(mesh, PREFIX_AXES[name], part.shape, in_use=in_use)
        for name, part in parts.items()
        if part is not None
    }


def fetch(value: Array) -> np.ndarray:
    """The whole of an array on the host, gathered from all devices."""
    if isinstance(value.sharding, NamedSharding):
        value = jax.device_put(value, everywhere(value.sharding.mesh))
    return np.asarray(value)


def zeros(mesh: Mesh | None, axes: Sequence[str | None], shape: Sequence[int], dtype: Any) -> Array:
    """Zeros split as arrays in use are; on the default device without a mesh."""
    device = None if mesh is None else sharding(mesh, axes, shape, in_use=True)
    return jnp.zeros(shape, dtype, device=device)
