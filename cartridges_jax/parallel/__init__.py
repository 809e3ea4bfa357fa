"""Many devices, of one process or many: the mesh, the table of sharding rules, and the job.

A mesh has three axes. `data` splits the rows of a batch; `fsdp` splits them too, and the
weights at rest, which are gathered layer by layer; `tensor` splits heads, the feed-forward
width and the vocabulary, whose weights are never gathered.

Programs learn their mesh from the parameters they are given (`constraints.on_mesh_of`):
with parameters on one device nothing is partitioned and nothing is constrained.
"""

from cartridges_jax.parallel.constraints import constrain, num_parts, on_mesh_of
from cartridges_jax.parallel.job import ALONE, Job
from cartridges_jax.parallel.mesh import independent_parts, make_mesh, parse_mesh
from cartridges_jax.parallel.placement import everywhere, fetch, place, place_prefix, prefix_shardings, replicate, zeros
from cartridges_jax.parallel.rules import RULES, dividing, partition, row_parts, sharding
from cartridges_jax.parallel.start import start_job

__all__ = [
    "ALONE",
    "RULES",
    "Job",
    "constrain",
    "dividing",
    "everywhere",
    "fetch",
    "independent_parts",
    "make_mesh",
    "num_parts",
    "on_mesh_of",
    "parse_mesh",
    "partition",
    "place",
    "place_prefix",
    "prefix_shardings",
    "replicate",
    "row_parts",
    "sharding",
    "start_job",
    "zeros",
]
