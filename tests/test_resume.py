"""Killed, stopped and started again: real processes of launch/train.py with a tiny model."""

from __future__ import annotations

import json
import re
import signal
import sys
import time

import numpy as np
import pytest
from tiny_runs import command, contents, finish, settings, start, talker_gguf, wait_until, write_inputs  # noqa: F401

from cartridges_jax.checkpoint import TrainCheckpoints, load_cartridge
from cartridges_jax.pipeline.workdir import Workdir


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    write_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, so that not every process makes them anew."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def values(talker_gguf, inputs):
    return settings(talker_gguf, inputs)


@pytest.fixture(scope="module")
def uninterrupted(values, inputs, cache):
    """The workdir of a run that nothing disturbed."""
    done = finish(command(values, inputs / "whole"), cache=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    return inputs / "whole", done


def wait_for(process, workdir, pattern):
    """Until a file appears in the workdir."""
    wait_until(process, lambda: any(workdir.glob(pattern)))


def outcome(workdir):
    """What must not depend on interruptions: the cartridge to the bit, the shards, the measured numbers."""
    cartridge = load_cartridge(workdir / "cartridge")
    arrays = {
        name: (array.dtype.name, array.shape, bytes(array.tobytes()))
        for name in ("keys", "values", "positions")
        for array in [np.asarray(getattr(cartridge.prefix, name))]
    }
    report = json.loads((workdir / "report.json").read_text())
    report.pop("seconds")
    shards = {name: value for name, value in contents(workdir, "study").items() if name.endswith(".parquet")}
    return arrays, cartridge.metadata, report, shards


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_cartridge_to_the_bit(
    values, tmp_path, cache, uninterrupted, rng
):
    arguments = command(values, tmp_path / "run")
    kills = 0
    for pattern in (".lock", "study/*/shard-00000.parquet", "train/*/checkpoints", "train/*/checkpoints/5"):
        process = start(arguments, cache)
        wait_for(process, tmp_path / "run", pattern)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3, "the run is too short to be killed in"
    done = finish(arguments, cache=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = outcome(tmp_path / "run"), outcome(uninterrupted[0])
    for one, other in zip(found, expected):
        assert one == other


@pytest.mark.parametrize(
    ("signum", "pattern"),
    [(signal.SIGTERM, "train/*/checkpoints"), (signal.SIGINT, "study/*/shard-00000.parquet")],
    ids=["SIGTERM while training", "SIGINT while studying"],
)
def test_a_stopped_run_says_how_to_go_on_and_does(values, tmp_path, cache, uninterrupted, signum, pattern):
    run = tmp_path / "run"
    arguments = command(values, run)
    process = start(arguments, cache)
    wait_for(process, run, pattern)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"stopped by {signum.name}; the same command resumes from here"
    if signum == signal.SIGTERM:
        (directory,) = run.glob("train/*/checkpoints")
        saved = max(int(path.name) for path in directory.glob("[0-9]*") if path.name.isdigit())
        # The bar's last state is the step that was taken last.
        assert saved == int(re.findall(r"(\d+)/12 ", errors)[-1])
        checkpoints = TrainCheckpoints(directory, 2)
        assert checkpoints.latest_step() == saved
        checkpoints.close()
    done = finish(arguments, cache=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    assert outcome(run) == outcome(uninterrupted[0])


def test_ctrl_c_before_the_run_has_begun_leaves_no_traceback():
    """While the libraries load, and in the chat: no stage is there to catch it."""
    program = (
        "import signal\nfrom cartridges_jax.pipeline.program import run_program\n"
        "run_program(lambda: signal.raise_signal(signal.SIGINT))"
    )
    done = finish([sys.executable, "-c", program])
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_a_second_process_in_the_same_workdir_is_refused(values, tmp_path, cache):
    with Workdir(tmp_path / "run").held():
        done = finish(command(values, tmp_path / "run"), cache=cache)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: another run is working in") and "--workdir" in line


def test_a_run_shows_its_progress_and_nothing_of_its_libraries(uninterrupted):
    _, done = uninterrupted
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert lines and all(line.split()[0] in ("study", "train", "evaluate") for line in lines), lines[:3]
    assert all("%" in line and "gone" in line for line in lines)
    assert len(done.stdout.splitlines()) < 40


def test_the_same_command_again_keeps_everything(values, uninterrupted, cache):
    workdir, _ = uninterrupted
    before = outcome(workdir)
    done = finish(command(values, workdir), cache=cache)
    assert done.returncode == 0
    for stage in ("study", "train", "evaluate"):
        assert f"{stage}: nothing changed, skipped" in done.stdout
    assert outcome(workdir) == before
