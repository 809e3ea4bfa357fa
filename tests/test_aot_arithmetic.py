"""Counts of ahead-of-time compiling: operations, bytes, rooflines; nothing is compiled."""

from __future__ import annotations

import inspect
import math

import jax
import numpy as np
import pytest
from aot_workloads import toy_workload
from jax.sharding import Mesh

from cartridges_jax.aot import inputs
from cartridges_jax.aot.hardware import H100, V5E
from cartridges_jax.aot.programs import whole_text_shape
from cartridges_jax.aot.roofline import flops_per_device, memory_bytes, total_work
from cartridges_jax.aot.throughput import fewest_devices, predict
from cartridges_jax.models.weights import abstract_loaded
from cartridges_jax.pipeline.config import from_config_dict
from cartridges_jax.pipeline.pod import pod_config, workload_of
from cartridges_jax.quantized import num_bytes
from cartridges_jax.sampling import generate_tokens

KEYS = [
    "program", "topology", "devices", "mesh", "bytes_per_device", "fits", "collectives", "collective_bytes", "flops_per_device",
    "roofline_seconds", "bound_by", "compile_seconds",
]  # fmt: skip


def abstract_mesh(**axes):
    """A mesh of as many places, all of them this machine's CPU: shapes and counts ask for no more."""
    sizes = {axis: axes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    devices = np.array([jax.devices("cpu")[0]] * math.prod(sizes.values())).reshape(*sizes.values())
    return Mesh(devices, tuple(sizes))


def test_the_flops_of_llama_31_8b_are_those_of_a_hand_count():
    """The numbers of docs/aot.md."""
    config = pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="v5e:4x4", mesh="data:4,tensor:4", micro_batches=8)
    workload = workload_of(from_config_dict(config))
    tokens = 32 * 2048
    weights = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    seen = 32 * 4 * (512 * 2048 + 512 * 513 // 2)
    layers = 3 * 2 * tokens * weights + 4 * 32 * seen * 4 * 4096  # forward, once more, backward (of attention: twice)
    head = 2 * 2 * (32 * 1536) * 4096 * 128256
    assert weights == 6_979_321_856
    assert sum(total_work("train", workload)) == pytest.approx(layers + head, rel=1e-9)
    assert sum(total_work("train", workload)) / 16 == pytest.approx(1.978e14, rel=0.02)


def test_what_a_mesh_does_not_divide_every_device_computes(tmp_path):
    workload = toy_workload(tmp_path / "toy")
    whole = sum(total_work("train", workload))
    assert flops_per_device("train", workload, abstract_mesh()) == pytest.approx(whole)
    assert flops_per_device("train", workload, abstract_mesh(data=2, tensor=2)) == pytest.approx(whole / 4)
    # Two key/value heads among four devices.
    work = total_work("train", workload)
    assert flops_per_device("train", workload, abstract_mesh(tensor=4)) == pytest.approx(
        work.heads + (work.mlp + work.vocab) / 4
    )


def test_a_device_reads_its_tensor_part_of_the_weights_and_all_that_fsdp_gathers(tmp_path):
    workload = toy_workload(tmp_path / "toy")
    one, tensor = (
        memory_bytes("prefill", workload, abstract_mesh()),
        memory_bytes("prefill", workload, abstract_mesh(tensor=2)),
    )
    assert tensor == pytest.approx(one / 2, rel=0.01)  # but for norms
    fsdp = memory_bytes("prefill", workload, abstract_mesh(fsdp=2))
    # It has half of the 32 prompts of 64 slots to itself, and nothing else.
    assert one - fsdp == pytest.approx(2 * 3 * 2 * 64 * 2 * 32 * 64 / 2)


def test_the_bytes_of_a_step_and_of_decoding_are_those_of_a_hand_count(tmp_path):
    workload, mesh = toy_workload(tmp_path / "toy"), abstract_mesh()
    matrices = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512) + 256 * 1024  # the embedding's few rows not counted
    weights = 2 * matrices + 4 * (3 * 2 * 256 + 256)  # norms are float32
    token = 2 * 3 * 2 * 64 * 2
    # Two micro-batches forward, again, backward; slots and two moments in float32, read and written.
    assert memory_bytes("train", workload, mesh) == 2 * 3 * (weights + 256 * token) + 2 * 3 * 256 * 2 * token
    # Eight tokens; eight conversations of 32 + 96 tokens behind what self-study reads.
    assert memory_bytes("decode", workload, mesh) == 8 * (weights + token * (workload.prefix_slots + 8 * 128))


def test_decoding_gains_with_what_the_cartridge_saves_in_memory():
    config = pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="v5e:4x4", mesh="data:4,tensor:4", micro_batches=8)
    workload = workload_of(from_config_dict(config))
    assert (fewest_devices(workload, V5E), fewest_devices(workload, H100)) == (2, 1)
    long, own, shared = predict(workload, H100, 1)
    # 16.1 GB of weights leave 62.1 of the 78.1 GB that a program may use; a token takes 128 KiB.
    assert long.num_rows == int((0.92 * 84_929_347_584 - 16_060_522_496) / (131072 * (131072 + 512))) == 3
    assert own.num_rows == int((0.92 * 84_929_347_584 - 16_060_522_496) / (131072 * (2048 + 512))) == 184
    assert long.tokens_per_second < own.tokens_per_second < shared.tokens_per_second
    assert (long.bound_by, own.bound_by) == ("memory", "memory")


def test_a_long_text_is_no_longer_than_what_the_model_sees():
    config = pod_config("Qwen/Qwen3-4B", topology="v5e:2x4", mesh="data:2,tensor:4", micro_batches=8)
    workload = workload_of(from_config_dict(config))
    assert (workload.context_tokens, workload.visible_tokens) == (131072, 40960)
    kv = 2 * 36 * 8 * 128 * 2
    weights = num_bytes(abstract_loaded(workload.config, "bfloat16", stored=""))
    assert predict(workload, V5E, 8)[0].num_rows == int((8 * V5E.memory_bytes - weights) / (kv * (40960 + 512)))


def test_decoding_is_compiled_as_self_study_decodes(tmp_path):
    """128 rows behind a chunk of at most 4,096 tokens and its template, in the bucket of a prefix."""
    config = pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="v5e:4x4", mesh="data:4,tensor:4", micro_batches=8)
    workload, mesh = workload_of(from_config_dict(config)), abstract_mesh(tensor=4)
    assert workload.decode_rows == inspect.signature(generate_tokens).parameters["batch_size"].default
    assert inputs.resident_prefix(workload, mesh).keys.shape == (32, 8, 4096 + 256, 128)
    assert inputs.decode_state(workload, mesh).cache.keys.shape == (32, 128, 8, 512, 128)
    # Training stays with the cartridge.
    assert inputs.frozen(workload, mesh).keys.shape == (32, 8, 2048, 128)
    whole = toy_workload(tmp_path / "toy", study__teacher_context="document", pod__context_tokens=3000)
    assert whole.prefix_slots == 3064
    assert toy_workload(tmp_path / "toy", cartridge__num_slots=3584).prefix_slots == 3584


def test_the_whole_text_is_read_with_room_for_a_conversation(tmp_path):
    config = pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="v5e:4x4", mesh="data:4,tensor:4", micro_batches=8)
    assert whole_text_shape(workload_of(from_config_dict(config))) == (512, 131072 - 512)
    workload = toy_workload(tmp_path / "toy")
    assert whole_text_shape(workload) == (512, 2048)
    # The last chunk: three layers of 4 heads of 64, and 2 of them for keys and values.
    seen = 512 * 1536 + 512 * 513 // 2
    layers = 512 * 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512) + seen * 4 * 256
    assert sum(total_work("whole_text", workload)) == 3 * layers
