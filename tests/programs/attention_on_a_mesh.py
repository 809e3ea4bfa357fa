"""Compares attention on meshes of eight devices with one device; exits with an error where they differ.

    python tests/programs/attention_on_a_mesh.py SEED

Run by tests/test_attention_kernels.py. The mesh is in context only while the forward pass is
traced, so that the backward pass has to remember it.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cartridges_jax.attention import LayerPrefix, PackedRows, attend, attention_implementation

B, T, N, K, H, P = 4, 9, 4, 2, 64, 6
# (data, fsdp, tensor), and how many key/value heads: the last ones do not divide.
MESHES = [((2, 2, 2), K), ((4, 1, 2), K), ((1, 8, 1), K), ((2, 1, 4), K), ((2, 2, 2), 1)]


def program(mesh, queries, keys, values, prefix, rows, upstream):
    def forward(queries, keys, values, prefix):
        if mesh is None:
            return attend(queries, keys, values, rows, prefix)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend(queries, keys, values, rows, prefix)

    out, backward = jax.vjp(forward, queries, keys, values, prefix)
    return out, backward(upstream)


def main() -> None:
    assert jax.device_count() == 8
    rng = np.random.default_rng(int(sys.argv[1]))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    segment_ids = jnp.asarray(np.sort(rng.integers(1, 4, (B, T)), axis=1), jnp.int32)
    rows = PackedRows(segment_ids, P + jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.arange(P), window=8)
    for shape, num_kv_heads in MESHES:
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        prefix = LayerPrefix(normal(num_kv_heads, P, H), normal(num_kv_heads, P, H), normal(num_kv_heads, P))
        queries, upstream = normal(B, T, N, H), normal(B, T, N, H)
        operands = (queries, normal(B, num_kv_heads, T, H), normal(B, num_kv_heads, T, H), prefix, rows, upstream)
        with attention_implementation("interpret"):
            expected = jax.jit(functools.partial(program, None))(*operands)
            on_mesh = jax.jit(functools.partial(program, mesh))
            assert str(jax.make_jaxpr(on_mesh)(*operands)).count("shard_map") == 2  # forward and backward
            found = on_mesh(*jax.device_put(operands, NamedSharding(mesh, PartitionSpec())))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


if __name__ == "__main__":
    main()
