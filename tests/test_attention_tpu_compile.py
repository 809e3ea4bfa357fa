"""The attention kernels compiled ahead of time for TPUs that are not there.

Needs the TPU compiler, which `jax[tpu]` brings as libtpu (BUILD.md, "Testing").
"""

from __future__ import annotations

import math
import os

# The compiler is loaded beside other processes', and asks no metadata server which TPU it is on.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cartridges_jax.aot.hlo import collectives
from cartridges_jax.aot.programs import compilation_cache_off
from cartridges_jax.attention import LayerPrefix, attend, attention_implementation, packed_view

MiB = 2**20


@pytest.fixture(scope="module")
def devices():
    """Four chips of a TPU v5e."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install 'jax[tpu]'")
    with compilation_cache_off():
        yield np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)


def compiled(mesh, *, B, T, N, K, H, P, dtype=jnp.bfloat16, bias=True, window=0, softcap=0.0):
    """Output and all gradients, as a compiled program; rows over data, heads over tensor."""

    def shape(axes, *sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    rows, own = shape(("data", None, "tensor"), B, T, N, H), shape(("data", "tensor"), B, K, T, H)
    front = shape(("tensor",), K, P, H)
    prefix = LayerPrefix(front, front, shape(("tensor",), K, P, dtype=jnp.float32) if bias else None)
    tokens = shape(("data",), B, T, dtype=jnp.int32)

    def program(queries, keys, values, prefix, segment_ids, positions, prefix_positions, upstream):
        own, front = packed_view(segment_ids, positions, prefix_positions, window=window, head_dim=H)
        out, backward = jax.vjp(
            lambda *leaves: attend(*leaves[:3], own, leaves[3], prefix_mask=front, softcap=softcap),
            queries, keys, values, prefix,
        )  # fmt: skip
        return out, backward(upstream)

    with jax.set_mesh(mesh):
        slots = shape((), P, dtype=jnp.int32)
        return jax.jit(program).lower(rows, own, own, prefix, tokens, tokens, slots, rows).compile()


def one_chip(devices) -> Mesh:
    return Mesh(devices[:1].reshape(1, 1, 1), ("data", "fsdp", "tensor"))


def test_scores_of_llama_31_8b_stay_on_the_chip(devices):
    sizes = dict(B=1, T=2048, N=32, K=8, H=128, P=2048)
    program = compiled(one_chip(devices), **sizes)
    memory = program.memory_analysis()
    assert program.as_text().count("tpu_custom_call") == 4  # forward, queries, own, prefix
    # Operands and gradients are 96 MiB; the scores alone would be 512 MiB in float32.
    assert memory.peak_memory_in_bytes < 200 * MiB
    with attention_implementation("xla"):
        plain = compiled(one_chip(devices), **sizes).memory_analysis()
    assert plain.peak_memory_in_bytes > 1000 * MiB


@pytest.mark.parametrize(
    "sizes",
    [
        dict(B=2, T=1000, N=9, K=3, H=64, P=144, bias=False),
        dict(B=1, T=600, N=8, K=4, H=256, P=2047, window=512, softcap=50.0),
        dict(B=1, T=600, N=4, K=4, H=128, P=700, dtype=jnp.float32),
    ],
    ids=["smollm2", "gemma2", "float32"],
)
def test_other_sizes_compile(devices, sizes):
    assert compiled(one_chip(devices), **sizes).as_text().count("tpu_custom_call") == 4


def test_on_a_mesh_only_the_gradient_of_the_prefix_is_sent(devices):
    mesh = Mesh(devices.reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    text = compiled(mesh, B=2, T=512, N=8, K=2, H=128, P=512).as_text()
    assert text.count("tpu_custom_call") == 4
    sent = collectives(text)
    assert {one.kind for one in sent} == {"all-reduce"}
    # Keys, values and biases of a device's one head; own keys and values alone would double it.
    assert sum(math.prod(shape) for one in sent for _, shape in one.arrays) <= 1.1 * 512 * (2 * 128 + 1)
