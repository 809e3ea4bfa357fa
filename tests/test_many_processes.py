"""Whole runs of several processes: launch/train.py under launch/local_multiprocess.py, with a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import ROOT, command, finish, settings, start, talker_gguf, wait_until, write_inputs  # noqa: F401

from cartridges_jax.checkpoint import load_cartridge

STEPS = 120


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def values(talker_gguf, inputs):
    return settings(
        talker_gguf, inputs, train__rows_per_step=8, train__steps=STEPS, train__checkpoint_every=3, train__eval_every=20,
        train__learning_rate=1e-2,
    )  # fmt: skip


def by_several(values, workdir, mesh, *, processes, devices, more=()) -> list[str]:
    """A run by so many processes with so many devices each."""
    program = command(values, workdir, f"--config.mesh={mesh}", *more)
    launcher = [sys.executable, str(ROOT / "launch" / "local_multiprocess.py")]
    return [*launcher, f"--processes={processes}", f"--devices={devices}", "--", *program[1:]]


def by_one(values, workdir, mesh) -> list[str]:
    return by_several(values, workdir, mesh, processes=1, devices=8)


@pytest.fixture(scope="module")
def uninterrupted(values, inputs, cache):
    """The workdir of a run by one process of eight devices."""
    done = finish(by_one(values, inputs / "whole", "data:8"), cache=cache, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return inputs / "whole"


@pytest.fixture
def studied(uninterrupted, tmp_path) -> Path:
    """A workdir in which only self-study was done."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    for name in ("train", "evaluate", "cartridge"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "report.json").unlink()
    return tmp_path / "run"


def saved_steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("train/*/checkpoints/*") if path.name.isdecimal())


def child(process, number) -> int:
    """The id of a launcher's process."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"--process_id={number}\0" in Path(f"/proc/{pid}/cmdline").read_text() + "\0":
            return int(pid)
    raise AssertionError(f"no process {number}")


def stop_one(arguments, workdir, number, cache, *, after: int) -> subprocess.CompletedProcess:
    """Starts a run and sends SIGTERM to one of its processes once a step above `after` is saved."""
    process = start(arguments, cache)
    wait_until(process, lambda: max(saved_steps(workdir), default=-1) > after)
    os.kill(child(process, number), signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


def curve(workdir) -> list[float]:
    (result,) = workdir.glob("train/*/result.json")
    history = json.loads(result.read_text())["history"]
    assert [entry["step"] for entry in history["train"]] == list(range(1, STEPS + 1))
    return [entry["loss"] for entry in history["train"] + history["heldout"]]


@pytest.mark.long
def test_sigterm_to_one_stops_all_and_other_meshes_and_hosts_go_on_to_the_same_end(
    values, studied, uninterrupted, cache
):
    first = stop_one(by_several(values, studied, "data:4,fsdp:2", processes=2, devices=4), studied, 1, cache, after=2)
    assert first.returncode == 128 + signal.SIGTERM, first.stderr[-3000:]
    stopped_at = saved_steps(studied)[-1]
    assert 3 <= stopped_at < STEPS - 10
    for number in range(2):
        assert f"[{number}] stopped by SIGTERM; the same command resumes from here" in first.stderr
    assert "Traceback" not in first.stderr

    second = stop_one(by_one(values, studied, "fsdp:8"), studied, 0, cache, after=stopped_at)
    assert second.returncode == 128 + signal.SIGTERM, second.stderr[-3000:]
    assert "study: nothing changed, skipped" in second.stdout
    assert stopped_at < saved_steps(studied)[-1] < STEPS

    third = finish(by_several(values, studied, "data:2,fsdp:2", processes=2, devices=2), cache=cache, timeout=300)
    assert third.returncode == 0, third.stderr[-3000:]
    np.testing.assert_allclose(curve(studied), curve(uninterrupted), rtol=1e-5)
    found, expected = (load_cartridge(workdir / "cartridge").prefix for workdir in (studied, uninterrupted))
    for name in ("keys", "values"):
        ours, theirs = (np.asarray(getattr(prefix, name)) for prefix in (found, expected))
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_a_run_of_two_processes_speaks_once_and_is_kept_by_one(values, tmp_path, cache):
    run = tmp_path / "run"
    done = finish(
        by_several(values | {"train.steps": 6}, run, "data:4", processes=2, devices=2), cache=cache, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[0] 2 processes" in done.stdout
    # But for what gloo tells of its connections, whose ends of lines may come late.
    assert not re.search(r"\[1\] (?!\[Gloo\]|\n)", done.stdout), done.stdout
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert all(re.match(r"\[0\] (study|train|evaluate|$)|\[\d\] \[Gloo\]", line) for line in lines), done.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["conditions"]["whole_text"]["teacher_kl"] == 0 and report["steps"] == 6
    again = finish(command(values | {"train.steps": 6}, run), cache=cache)
    for stage in ("study", "train", "evaluate"):
        assert f"{stage}: nothing changed, skipped" in again.stdout


@pytest.mark.long
def test_a_process_that_is_killed_ends_the_run_with_one_line_and_the_same_command_goes_on(values, studied, cache):
    arguments = by_several(values, studied, "data:8", processes=2, devices=4, more=["--peer_seconds=6"])
    process = start(arguments, cache)
    wait_until(process, lambda: bool(saved_steps(studied)))
    os.kill(child(process, 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    complaints = [line for line in errors.splitlines() if line.startswith("[0] error")]
    assert len(complaints) == 1 and "lost process 1 on" in complaints[0], errors
    assert "Traceback" not in errors
    step = saved_steps(studied)[-1]
    done = stop_one(by_one(values, studied, "data:8"), studied, 0, cache, after=step)
    assert done.returncode == 128 + signal.SIGTERM and saved_steps(studied)[-1] > step


def test_several_processes_without_a_mesh_are_refused(values, tmp_path):
    done = finish(by_several(values, tmp_path / "run", "", processes=2, devices=1))
    assert done.returncode == 2
    assert "error: 2 processes need a mesh over their devices, such as --config.mesh=data:-1" in done.stderr
    assert not (tmp_path / "run").exists()
