"""Kernels on a mesh: each device computes its rows and heads.

XLA cannot partition a Pallas kernel, so a kernel runs under `shard_map`, over the mesh in
context (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` while a program is traced).
The rows of a batch and the key/value heads, with their query heads, are placed by
`parallel.rules`; what its axes do not divide is computed by every device. Every device that
has a head sees the whole prefix of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from cartridges_jax.parallel import RULES, dividing


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placement of rows and heads; stored, because a backward pass is traced later and elsewhere.

    Attributes:
      mesh: None where nothing is to be partitioned.
      rows, heads: the mesh axes that split them.
    """

    mesh: AbstractMesh | None
    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def by_row(self) -> PartitionSpec:
        """The spec of [B, …]."""
        return PartitionSpec(self.rows)

    @property
    def by_row_and_head(self) -> PartitionSpec:
        """The spec of [B, N, …] and [B, K, …]."""
        return PartitionSpec(self.rows, self.heads)

    @property
    def by_head(self) -> PartitionSpec:
        """The spec of [K, …]."""
        return PartitionSpec(self.heads)

    def spread(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The function, run by every device on its part."""
        if self.mesh is None:
            return function
        # Pallas calls do not declare the axes over which their results vary.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def sum_over_rows(self, x: Array) -> Array:
        """Inside of a spread function: the sum over the devices' rows."""
        return jax.lax.psum(x, self.rows) if self.rows else x


def layout_in_context(num_rows: int, num_kv_heads: int) -> Layout:
    """The layout of B rows and K key/value heads on the mesh in context, if there is one.

    Inside of a `shard_map` arrays are the device's own parts already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return Layout(None)
    rows, heads = RULES["rows"].in_use, RULES["kv_heads"].in_use
    return Layout(mesh, dividing(mesh, rows, num_rows), dividing(mesh, heads, num_kv_heads))
