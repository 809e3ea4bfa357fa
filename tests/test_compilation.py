"""The cache of compiled programs: a second start reads them, and nothing in it can stop a start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cartridges_jax.pipeline import compilation

ROOT = Path(__file__).parents[1]
# As the launch programs do it; reading the config imports JAX.
PROGRAM = """
import os
from ml_collections import config_flags
from cartridges_jax.pipeline.program import run_program
config_flags.DEFINE_config_file("config")

def main():
    import jax
    from jax._src import monitoring
    hits = []
    monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
    print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8)))), len(hits) > 0)
    # For the programs that this one starts.
    print(os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE", ""))

run_program(main)
"""


def start(tmp_path, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--config=experiments/quickstart.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **inherited,
            "PYTHONPATH": str(ROOT),
            "CARTRIDGES_JAX_CACHE": str(tmp_path),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_second_start_reads_what_the_first_compiled_and_damage_only_costs_time(tmp_path):
    assert start(tmp_path) == ["512.0", "False", str(2**31)]
    assert start(tmp_path) == ["512.0", "True", str(2**31)]
    entries = list((tmp_path / "xla").rglob("*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
    assert start(tmp_path)[0] == "512.0"


def test_the_users_directory_counts_and_an_empty_one_is_none(tmp_path):
    start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert list((tmp_path / "mine").iterdir()) and not (tmp_path / "xla").exists()
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR="") == ["512.0", "False"]
    assert not (tmp_path / "xla").exists()


@pytest.mark.parametrize(
    ("change", "same"), [("cpu MHz\t: 2000", True), ("flags\t: sse avx avx512f", False), ("model\t: 85", False)]
)
def test_processors_of_unlike_instructions_share_nothing(tmp_path, change, same):
    cpuinfo = tmp_path / "cpuinfo"
    lines = ["model\t: 79", "cpu MHz\t: 1000", "flags\t: sse avx"]
    cpuinfo.write_text("\n".join(lines))
    before = compilation.processor(cpuinfo)
    name = change.split(":")[0]
    cpuinfo.write_text("\n".join(change if line.startswith(name) else line for line in lines))
    assert (compilation.processor(cpuinfo) == before) == same
    assert compilation.processor(tmp_path / "none")
