"""What a program says about its own arrays: how they lie while they are computed with.

The mesh is that of the parameters, which is part of their type while a program is traced.
Without one, every function here leaves the program as it was written.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax import Array

from cartridges_jax.parallel.rules import partition, parts_on


def on_mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """The block's constraints hold on the mesh that the parameters lie on, if on one."""
    mesh = jax.typeof(jax.tree.leaves(params)[0]).sharding.mesh
    return contextlib.nullcontext() if mesh.empty else jax.sharding.use_abstract_mesh(mesh)


def constrain(x: Array, *axes: str | None) -> Array:
    """x, split as the rules say of arrays in use.

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
    """Into how many parts a logical axis of this length is split when in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return parts_on(mesh, axis, size)
