"""Jobs to compile ahead, and the program that does it, for several tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cartridges_jax.aot.workload import Workload
from cartridges_jax.pipeline.config import from_config_dict
from cartridges_jax.pipeline.pod import pod_config, workload_of

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install -e '.[tpu]'"
)
# Heads as wide as the kernels take them, and all else small.
TOY = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 512,
    "max_position_embeddings": 4096, "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
    "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 1024,
}  # fmt: skip
SMALL = {
    "cartridge.num_slots": 256, "train.rows_per_step": 8, "train.row_tokens": 256, "train.micro_batches": 2,
    "study.writer_max_tokens": 32, "study.answer_max_tokens": 96, "pod.decode_rows": 8, "pod.context_tokens": 2048,
}  # fmt: skip


def write_toy(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TOY))
    return directory


def toy_workload(directory: Path, *, topology: str = "v5e:2x2", mesh: str = "data:2,tensor:2", **overrides) -> Workload:
    config = pod_config(str(write_toy(directory)), topology=topology, mesh=mesh, micro_batches=2)
    config.update_from_flattened_dict(SMALL | {name.replace("__", "."): value for name, value in overrides.items()})
    return workload_of(from_config_dict(config))


def load_pods() -> ModuleType:
    """`experiments/pods.py`, as a module."""
    spec = importlib.util.spec_from_file_location("pods", ROOT / "experiments" / "pods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PODS = sorted(load_pods().PODS)


def pod_workload(name: str) -> Workload:
    """The workload of a config of `PODS`."""
    return workload_of(from_config_dict(load_pods().get_config(name)))


def run_aot(config: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the launch program."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "aot.py"), f"--config={config}", *arguments], cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def toy_flags(directory: Path, topology: str, mesh: str) -> list[str]:
    values = {**SMALL, "model": write_toy(directory), "pod.topology": topology, "mesh": mesh}
    return [f"--config.{name}={value}" for name, value in values.items()]


def records(done: subprocess.CompletedProcess) -> dict[str, dict]:
    """The JSON lines at the end, by program."""
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.stdout.splitlines()[-len(lines) :] == [
        line for line in done.stdout.splitlines() if line.startswith("{")
    ]
    return {record["program"]: record for record in lines}
