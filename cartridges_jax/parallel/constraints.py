"""Sharding constraints inside programs: how arrays are split while they are in use.

The mesh is that of the parameters, which is part of their type while a program is traced.
Without one, every function here leaves the program unchanged.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax import Array

from cartridges_jax.parallel.rules import partition, parts_on


def on_mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """Applies the block's constraints on the parameters' mesh, if they have one."""
    mesh = jax.typeof(jax.tree.leaves(params)[0]).sharding.mesh
    return contextlib.nullcontext() if mesh.empty else jax.sharding.use_abstract_mesh(mesh)


def constrain(x: Array, *axes: str | None) -> Array:
    """x, split by the rules for arrays in use.

    Args:
      axes: per axis of x its logical name, or None; no names mean that every device has
        all of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = partition(mesh, axes or (None,) * x.ndim, x.shape, in_use=True)
    return jax.lax.with_sharding_constraint(x, spec)


def num_parts(axis: str, size: int) -> int:
    """The number of parts that a logical axis of this length is split into when in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return parts_on(mesh, axis, size)
