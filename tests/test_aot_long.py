"""The pods of `experiments/pods.py`, compiled at the paper's sizes: p = 2,048, 32 packs of 2,048 tokens a step."""

from __future__ import annotations

import importlib.util
import math

import pytest
from aot_workloads import PODS, needs_libtpu, pod_workload

from cartridges_jax.aot.check import check, mesh_of
from cartridges_jax.aot.topology import find
from cartridges_jax.aot.workload import Workload
from cartridges_jax.pipeline.config import from_config_dict
from cartridges_jax.pipeline.pod import pod_config, workload_of

pytestmark = pytest.mark.long
GiB = 2**30
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the GPU compiler is not installed: pip install -e '.[cuda]'",
)


def step_of(workload: Workload):
    found = find(workload.topology)
    return check("train", workload, found, mesh_of(workload.mesh, found))


def step(topology: str, mesh: str, micro_batches: int):
    config = pod_config(MODEL, topology=topology, mesh=mesh, micro_batches=micro_batches)
    return step_of(workload_of(from_config_dict(config)))


def smallest_weight(tensor: int) -> int:
    """Numbers of the smallest matrix of a layer, or the part of it that a device holds: k_proj, [4096, 1024]."""
    return 4096 * 1024 // tensor


@pytest.fixture(scope="module")
def v5e():
    return step_of(pod_workload("llama31_8b_v5e16"))


@needs_libtpu
def test_on_16_v5e_a_step_takes_at_most_6_gib_a_chip(v5e):
    assert v5e.fits and v5e.bytes_per_device <= 6.0 * GiB


@needs_libtpu
def test_on_16_v5e_no_weight_is_gathered_in_a_loop(v5e):
    in_loops = [one for one in v5e.sent if one.kind == "all-gather" and one.depth]
    assert all(math.prod(shape) < smallest_weight(4) for one in in_loops for _, shape in one.arrays), in_loops
    # Eight micro-batches of 32 layers: activations are summed twice a layer in each of three passes.
    assert sum(one.times for one in v5e.sent if one.kind in ("all-reduce", "reduce-scatter")) >= 8 * 32 * 2 * 2


@needs_libtpu
def test_accumulation_inside_the_step_is_what_saves_the_memory(v5e):
    assert step("v5e:4x4", "data:4,tensor:4", 1).bytes_per_device > 1.5 * v5e.bytes_per_device


@needs_libtpu
@pytest.mark.parametrize(("topology", "mesh", "micro_batches"), [
    ("v5e:4x4", "fsdp:16", 2), ("v5p:2x2x4", "data:4,tensor:4", 8), ("v6e:4x4", "data:4,tensor:4", 8),
])  # fmt: skip
def test_on_other_meshes_of_16_a_step_fits(topology, mesh, micro_batches):
    assert step(topology, mesh, micro_batches).fits


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_cuda if "_h100" in name else needs_libtpu) for name in PODS]
)
def test_the_step_of_every_pod_fits(name):
    found = step_of(pod_workload(name))
    assert found.fits and not found.topology.stand_in, f"{found.bytes_per_device / GiB:.2f} GiB"
