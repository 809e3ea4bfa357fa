"""Many devices: the mesh, and the one table that says what lies where on it.

A mesh has three axes. `data` splits the rows of a batch; `fsdp` splits them too, and the
weights at rest, which are gathered layer by layer; `tensor` splits heads, the feed-forward
width and the vocabulary, whose weights are never gathered.

Programs learn their mesh from the parameters they are given (`constraints.on_mesh_of`):
with parameters on one device nothing is partitioned and nothing is constrained.
"""
from cartridges_jax.parallel.constraints import constrain, num_parts, on_mesh_of
from cartridges_jax.parallel.mesh import make_mesh, parse_mesh
from cartridges_jax.parallel.placement import everywhere, fetch, place, place_prefix, zeros
from cartridges_jax.parallel.rules import RULES, dividing, partition, row_parts, sharding

__all__ = [
    "RULES", "constrain", "dividing", "everywhere", "fetch", "make_mesh", "num_parts", "on_mesh_of", "parse_mesh",
    "partition", "place", "place_prefix", "row_parts", "sharding", "zeros",
]
