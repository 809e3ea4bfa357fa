"""SIGKILL at random moments on the real model; minutes long, so for `make test-long`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cartridges_jax.checkpoint import load_cartridge

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--config.study.conversations=60",
    "--config.study.requests_per_batch=32",
    "--config.train.steps=24",
    "--config.train.checkpoint_every=4",
    "--config.evaluation.max_questions=4",
    "--config.heldout=8",
)


def start(workdir: Path) -> subprocess.Popen:
    arguments = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"--config={ROOT / 'experiments' / 'quickstart.py'}",
        f"--workdir={workdir}",
        *SETTINGS,
    ]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def work_done(workdir: Path) -> set[Path]:
    """What a run has put by so far: shards of conversations, and checkpoints."""
    return {*workdir.rglob("shard-*.parquet"), *workdir.rglob("checkpoints/*")}


def killed_after_new_work(workdir: Path, rng: np.random.Generator) -> bool:
    """Runs until something new has been put by and a random while longer; False if the run came to its end.

    Not after a share of an earlier run's time: how long one takes depends on what was compiled before.
    """
    before = work_done(workdir)
    process = start(workdir)
    while process.poll() is None and not work_done(workdir) - before:
        time.sleep(0.05)
    try:
        process.wait(timeout=rng.uniform(0, 4))
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.long
def test_the_real_models_cartridge_is_the_same_to_the_bit_after_kills_at_random_moments(tmp_path, rng):
    assert start(tmp_path / "whole").wait() == 0
    kills = sum(killed_after_new_work(tmp_path / "killed", rng) for _ in range(6))
    assert kills >= 4
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = (load_cartridge(tmp_path / name / "cartridge") for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole.prefix.keys, killed.prefix.keys)
    np.testing.assert_array_equal(whole.prefix.values, killed.prefix.values)
    assert whole.metadata == killed.metadata
