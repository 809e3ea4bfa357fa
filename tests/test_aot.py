"""Programs compiled ahead of time for absent devices: a toy model, in seconds; the 8B is in test_aot_long.py."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from aot_workloads import PODS, ROOT, load_pods, needs_libtpu, records, run_aot, toy_flags, toy_workload
from jax.sharding import Mesh

from cartridges_jax.aot.check import Check, mesh_of, with_micro_batches
from cartridges_jax.aot.hardware import CHIPS, V5E
from cartridges_jax.aot.programs import compile_program
from cartridges_jax.aot.roofline import Roofline
from cartridges_jax.aot.scaling import LAYOUTS
from cartridges_jax.aot.sweep import meshes, rank
from cartridges_jax.aot.topology import Topology, as_own_slice, find, of_size, parse_topology
from cartridges_jax.errors import UserError
from cartridges_jax.models import load_model
from cartridges_jax.models.decoder import abstract_params
from cartridges_jax.models.published import PUBLISHED, config_without_weights
from cartridges_jax.models.weights import abstract_loaded
from cartridges_jax.parallel import independent_parts
from cartridges_jax.pipeline.config import from_config_dict
from cartridges_jax.pipeline.pod import workload_of

KEYS = [
    "program", "topology", "devices", "mesh", "bytes_per_device", "fits", "collectives", "collective_bytes", "flops_per_device",
    "roofline_seconds", "bound_by", "compile_seconds",
]  # fmt: skip


def abstract_mesh(**axes):
    """A mesh of as many places, all of them this machine's CPU: shapes and counts ask for no more."""
    sizes = {axis: axes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    devices = np.array([jax.devices("cpu")[0]] * math.prod(sizes.values())).reshape(*sizes.values())
    return Mesh(devices, tuple(sizes))


# Models and configs


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m-instruct", 0.1345), ("meta-llama/Llama-3.2-3B-Instruct", 3.21), ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("meta-llama/Llama-3.1-70B-Instruct", 70.55), ("Qwen/Qwen3-4B", 4.02), ("Qwen/Qwen3-32B", 32.76),
    ],
)  # fmt: skip
def test_published_models_have_the_parameters_their_publishers_count(name, billions):
    leaves = jax.tree.leaves(abstract_params(config_without_weights(name)))
    assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_published_model_has_a_pod_of_every_kind():
    found = set()
    for name in PODS:
        config = from_config_dict(load_pods().get_config(name))
        workload = workload_of(config)
        sizes = dict(part.split(":") for part in config.mesh.split(","))
        devices = math.prod(map(int, sizes.values()))
        assert devices == math.prod(parse_topology(config.pod.topology)[1]), name
        kind = config.pod.topology.split(":")[0]
        assert name.endswith(f"_{kind}x{devices}" if kind == "h100" else f"_{kind}{devices}")
        rows = int(sizes.get("data", 1)) * int(sizes.get("fsdp", 1))
        assert with_micro_batches(workload, rows).train.micro_batches == config.train.micro_batches, name
        found.add((config.model, kind))
    names = set(PUBLISHED) - {"smollm2-135m-instruct"}
    assert found == {(name, chip) for name in names for chip in CHIPS}


@pytest.mark.parametrize(
    ("name", "complaint"), [("", "a pod's name is missing"), ("llama9_8b_v5e16", "there is no pod 'llama9_8b_v5e16'")]
)
def test_a_pod_that_is_not_in_the_table_is_refused_with_the_names_there_are(name, complaint):
    with pytest.raises(UserError, match=f"{complaint}: .*llama31_8b_v5e16, .*qwen3_32b_h100x8"):
        load_pods().get_config(name)


def test_a_program_refuses_an_unknown_pod_in_one_line():
    done = run_aot("experiments/pods.py:nothing")
    assert done.returncode == UserError.exit_code
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no pod 'nothing'")


def test_a_model_of_which_nothing_is_known_is_refused():
    with pytest.raises(UserError, match="someone/Something.*Llama-3.1-8B"):
        config_without_weights("someone/Something")


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", ""), ("bfloat16", ""), ("float32", "int8"), ("float32", "bfloat16")]
)
def test_shapes_of_weights_are_those_that_loading_gives(tiny_gguf, dtype, stored):
    model = load_model(str(tiny_gguf), dtype=dtype, weights=stored)
    found = abstract_loaded(model.config, model.dtype, stored=stored)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), model.params
    )
    assert config_without_weights(str(tiny_gguf)) == model.config


# Topologies and meshes


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v5e", "write v5e:4x4"), ("v9:4x4", "write v5e:4x4"), ("v5e:2x2x4", "a v5e has 2 dimensions"), ("h100:12", "nodes of 8"),
        ("v5e:16x32", "connect 256 at most"), ("v5p:0x2x2", "of 1 or more"),
    ],
)  # fmt: skip
def test_a_topology_that_cannot_be_is_refused(name, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_topology(name)


@needs_libtpu
@pytest.mark.parametrize("line", ["data:4,tensor:8", "data:2,fsdp:2,tensor:8"])
def test_a_part_of_a_slice_is_compiled_for_as_a_slice_of_its_shape(line):
    whole = find("v6e:4x8")
    part = independent_parts(mesh_of(line, whole))[0]
    numbers = sorted(device.id for device in part.devices.flat)
    # The TPU compiler would refuse them.
    assert len(numbers) == 16 and numbers != list(range(16))
    alone = as_own_slice(part, whole)
    assert sorted(device.id for device in alone.devices.flat) == list(range(16))
    assert alone.shape == part.shape and alone.axis_names == part.axis_names
    first = np.array(part.devices.flat[0].coords) - np.array(alone.devices.flat[0].coords)
    for ours, theirs in zip(alone.devices.flat, part.devices.flat, strict=True):
        assert (np.array(theirs.coords) - np.array(ours.coords)).tolist() == first.tolist()
    assert as_own_slice(mesh_of(line, whole), whole) == mesh_of(line, whole)


def test_a_sweep_tries_every_mesh_that_splits_rows_and_heads_evenly(tmp_path):
    workload = toy_workload(tmp_path / "toy")
    assert list(meshes(4, workload)) == [
        "data:4,fsdp:1,tensor:1", "data:2,fsdp:2,tensor:1", "data:1,fsdp:4,tensor:1",
        "data:2,fsdp:1,tensor:2", "data:1,fsdp:2,tensor:2",
    ]  # fmt: skip
    assert not list(meshes(32, workload))


def test_a_sweep_prefers_of_equal_times_what_sends_less_and_then_what_takes_less():
    topology = Topology("v5e:2x2", V5E, (2, 2), [None] * 4)

    def result(mesh, compute, network, gib, sent=()):
        return Check("train", topology, mesh, 4, 1, int(gib * 2**30), sent, 0.0, Roofline(compute, 0.0, network), 0.0)

    results = [
        result("too large", 1.0, 0.0, 90.0, None), result("slow", 2.0, 0.0, 1.0), result("sends", 1.0, 0.9, 1.0),
        result("large", 1.0, 0.1, 9.0), result("best", 1.0, 0.1, 8.0), result("hardly too large", 1.0, 0.0, 16.0),
    ]  # fmt: skip
    assert [one.mesh for one in sorted(results, key=rank)] == [
        "best", "large", "sends", "slow", "hardly too large", "too large",
    ]  # fmt: skip


def test_micro_batches_give_way_to_the_parts_of_a_mesh(tmp_path):
    workload = toy_workload(tmp_path / "toy", train__rows_per_step=12, train__micro_batches=4)
    assert [with_micro_batches(workload, parts).train.micro_batches for parts in (1, 2, 3, 4, 6, 12)] == [
        4,
        3,
        4,
        3,
        2,
        1,
    ]
    with pytest.raises(UserError, match="12 rows a step are not divisible into 8"):
        with_micro_batches(workload, 8)


def test_layouts_use_all_devices():
    for layout in LAYOUTS.values():
        for number in (1, 2, 8, 512):
            assert math.prod(int(part.split(":")[1]) for part in layout(number).split(",")) == number


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "number", "name"),
    [
        ("v5e", 1, "v5e:2x2"), ("v5e", 8, "v5e:2x4"), ("v5e", 32, "v5e:4x8"), ("v6e", 16, "v6e:4x4"), ("v5p", 4, "v5p:2x2x1"),
        ("v5p", 16, "v5p:2x2x4"), ("v5p", 64, "v5p:4x4x4"),
    ],
)  # fmt: skip
def test_so_many_chips_are_those_of_the_smallest_slice_that_has_them(chip, number, name):
    found = of_size(CHIPS[chip], number)
    assert (found.name, len(found.devices)) == (name, number)


def test_more_chips_than_links_connect_are_refused():
    with pytest.raises(UserError, match="the links of v5e connect 256"):
        of_size(V5E, 512)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A toy of two rows and two key/value heads on 1, 2 and 4 CPU devices in the place of H100s: its points and their table."""
    if importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("the compiler for GPUs is installed")
    code = """
import dataclasses, json, sys
from pathlib import Path
from aot_workloads import toy_workload
from cartridges_jax.aot.hardware import H100
from cartridges_jax.aot.scaling import scale, scaling_table
workload = toy_workload(Path(sys.argv[1]), train__rows_per_step=2, train__micro_batches=1, train__remat=False)
points = scale(workload, H100, sizes=(1, 2, 4), layouts=("data", "tensor"))
found = [(p.layout, p.num_devices, p.check and p.check.roofline.seconds, p.stops, p.efficiency) for p in points]
print(json.dumps({"points": found, "table": scaling_table(points)}))
"""
    environment = {
        **os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path_factory.mktemp("toy"))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_layout_is_followed_until_rows_or_heads_run_out(scaled):
    points = {(layout, number): rest for layout, number, *rest in scaled["points"]}
    assert list(points) == [(layout, number) for layout in ("data", "tensor") for number in (1, 2, 4)]
    assert points["data", 4] == [None, "2 rows a step do not divide by 4", None]
    assert points["tensor", 4] == [None, "2 key/value heads do not divide by 4", None]
    for layout in ("data", "tensor"):
        (one, none, whole), (two, _, efficiency) = points[layout, 1], points[layout, 2]
        assert (none, whole) == ("", 1.0)
        assert efficiency == pytest.approx(one / (2 * two))
    # So small a model is sent longer than it is computed.
    assert points["tensor", 2][2] < 0.5 and points["tensor", 2][1] == "collectives take longer than arithmetic"


def test_the_table_of_layouts_has_a_row_for_each_point_and_its_reason(scaled):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scaled["table"].splitlines()]
    assert rows[0][0] == "layout" and rows[0][-1] == "stops because"
    for row, (layout, number, seconds, stops, efficiency) in zip(rows[2:], scaled["points"], strict=True):
        assert (row[0], row[1], row[-1]) == (layout, str(number), stops)
        assert (row[5], row[7]) == (("", "") if seconds is None else (f"{seconds:.3g} s", f"{efficiency:.0%}"))


# The programs


@needs_libtpu
def test_a_toy_is_compiled_for_a_tpu_slice(tmp_path):
    flags = toy_flags(tmp_path / "toy", "v5e:2x2", "data:2,tensor:2")
    done = run_aot("experiments/pods.py:llama31_8b_v5e16", *flags)
    found = records(done)
    assert list(found) == ["train", "prefill", "decode"]
    assert "| prefix" in done.stdout and "1 x h100" in done.stdout
    for record in found.values():
        assert list(record) == KEYS
        assert (record["topology"], record["devices"], record["mesh"]) == ("v5e:2x2", 4, "data:2,tensor:2")
        assert record["fits"] and 0 < record["bytes_per_device"] < V5E.memory_bytes
        assert record["roofline_seconds"] > 0
        # Tensor parallelism sums activations, and gathers nothing as large as a weight.
        assert record["collectives"]["all-reduce"] > 0
    # Two micro-batches, three layers; forward, recomputed, backward: two sums each, but for the last sum of the forward
    # pass that is not needed again.
    assert found["train"]["collectives"]["all-reduce"] >= 2 * 3 * 4
    # Eight tokens of three layers.
    assert found["decode"]["collectives"]["all-reduce"] >= 8 * 3 * 2


def test_the_read_of_the_whole_text_is_compiled_too(tmp_path):
    workload, mesh = toy_workload(tmp_path / "toy"), abstract_mesh()
    assert compile_program("whole_text", workload, mesh).bytes_per_device > 2048 * 2 * 3 * 2 * 64 * 2  # its cache


@needs_libtpu
def test_a_sweep_prints_every_mesh_and_the_best_as_json(tmp_path):
    flags = toy_flags(tmp_path / "toy", "v5e:2x2", "")
    done = run_aot("experiments/pods.py:llama31_8b_v5e16", *flags, "--sweep", "--programs=train")
    best = records(done)["train"]
    table = [line for line in done.stdout.splitlines() if line.startswith("| train")]
    assert len(table) == 5 and table[0].split("|")[2].strip() == best["mesh"]
    assert "| prefix" in done.stdout and "1 x h100" in done.stdout


@needs_libtpu
def test_what_does_not_fit_is_said_with_its_size():
    """The 70B on four chips: the compiler gives up, and says what it would take."""
    done = run_aot(
        "experiments/pods.py:llama31_70b_v5e32",
        "--config.pod.topology=v5e:2x2",
        "--config.mesh=tensor:4",
        "--programs=decode",
    )
    found = records(done)["decode"]
    assert not found["fits"] and found["bytes_per_device"] > V5E.memory_bytes
    assert found["collectives"] is None and found["collective_bytes"] is None


def test_without_the_compiler_for_gpus_cpu_devices_stand_in_and_say_so(tmp_path):
    if importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("the compiler for GPUs is installed")
    flags = toy_flags(tmp_path / "toy", "h100:8", "data:4,tensor:2")
    done = run_aot("experiments/pods.py:llama31_8b_h100x8", *flags, "--programs=train", JAX_NUM_CPU_DEVICES="8")
    found = records(done)["train"]
    assert found["compiled_for"].startswith("cpu") and found["collectives"]["all-reduce"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--config.pod.topology=",), "pod.topology is empty"),
        (("--config.pod.topology=v7:1",), "topology 'v7:1'"),
        (("--programs=train,dance",), "no program 'dance'"),
        (("--config.model=nobody/nothing",), "nobody/nothing"),
    ],
)
def test_what_cannot_be_compiled_is_one_plain_line(arguments, complaint):
    done = run_aot("experiments/pods.py:llama31_8b_v5e16", *arguments)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr
