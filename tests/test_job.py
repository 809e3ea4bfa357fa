"""Several processes of one job, on this machine: how they find each other, agree, and end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cartridges_jax.errors import UserError
from cartridges_jax.parallel import ALONE, start_job
from cartridges_jax.parallel.mesh import _unshared_rows
from cartridges_jax.parallel.start import _local_devices, scheduler

ROOT = Path(__file__).parents[1]
SCENES = ROOT / "tests" / "programs" / "job.py"
LAUNCHER = ROOT / "launch" / "local_multiprocess.py"


def together(program, *arguments, processes=2, timeout=300, **options):
    """Runs a program as several processes of one device each.

    With `grace_seconds` above `timeout`, those that the launcher would have to end never end.
    """
    flags = [f"--{name}={value}" for name, value in {"processes": processes, "devices": 1, **options}.items()]
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *flags, "--", str(program), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lines_of(process, text):
    """What one process wrote, without what gloo tells of its connections."""
    lines = [line.removeprefix(f"[{process}] ") for line in text.splitlines() if line.startswith(f"[{process}] ")]
    return [line for line in lines if line and not line.startswith("[Gloo]")]


def said(done, process):
    """The lines of one process on stdout."""
    return lines_of(process, done.stdout)


def complaint(done, process):
    """The only line of one process on stderr."""
    (line,) = lines_of(process, done.stderr)
    return line


# Finding each other


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Not on a Cloud TPU VM, and started by no scheduler."""
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", False)
    for name in (
        "SLURM_STEP_NODELIST", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "JOB_COMPLETION_INDEX",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ""),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        # The shell of an allocation, not a step of it.
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1", "TPU_WORKER_ID": "1"}, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a-0", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
        # A pod of an indexed job that has a whole slice to itself.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "a-0"}, ""),
        # A notebook or a CI runner in a cluster.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "TPU_WORKER_HOSTNAMES": "a-0,a-1"},
            "gketpu",
        ),
    ],
)
def test_a_scheduler_is_known_by_what_it_sets_for_one_of_several_processes(environ, expected):
    assert scheduler(environ) == expected


def test_a_cloud_tpu_vm_is_known_by_what_jax_found(monkeypatch):
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    assert scheduler({}) == "gcetpu"
    assert scheduler({"TPU_SKIP_MDS_QUERY": "1"}) == ""
    assert scheduler({"TPU_WORKER_HOSTNAMES": "localhost"}) == ""


def test_one_task_a_node_has_all_gpus_of_the_node():
    whole_node = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    assert _local_devices(whole_node) == list(range(8))
    assert _local_devices(whole_node | {"SLURM_NTASKS": "16"}) is None
    assert _local_devices({"SLURM_NTASKS": "2", "SLURM_NNODES": "2"}) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distributed": "maybe"}, "distributed='maybe': choose one of auto, on, off"),
        ({"distributed": "off", "process_id": 0}, "'off' contradicts process_id"),
        ({"distributed": "on"}, "neither SLURM nor Cloud TPU nor Kubernetes"),
        ({"num_processes": 2, "process_id": 0}, "num_processes, process_id without coordinator"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "coordinator='host': write it as HOST:PORT"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id=2 of num_processes=2"),
        ({"peer_seconds": 0}, "peer_seconds=0"),
    ],
)
def test_settings_that_make_no_job_are_refused_in_words(settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        start_job(**settings)


def test_without_flags_and_scheduler_a_process_is_alone():
    assert type(start_job()) is type(ALONE)
    assert type(start_job("off")) is type(ALONE)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0, 0], [0, 0]], [[0, 1]]),
        ([[0, 0], [1, 1]], [[0], [1]]),
        ([[0, 0], [0, 0], [1, 1], [1, 1]], [[0, 1], [2, 3]]),
        # A model over two processes each; and over all of them.
        ([[0, 1], [2, 3]], [[0], [1]]),
        ([[0, 1], [1, 2], [3, 3]], [[0, 1], [2]]),
        ([[0, 1], [2, 3], [1, 2]], [[0, 1, 2]]),
        ([[1, 1], [0, 0], [1, 1]], [[0, 2], [1]]),
    ],
)
def test_a_mesh_is_cut_where_no_process_is_on_both_sides(labels, expected):
    assert _unshared_rows(np.array(labels)) == expected


# Together


def test_all_have_what_the_first_one_says_and_wait_for_each_other():
    done = together(SCENES, "--scene=values", "--who=1")
    assert done.returncode == 0, done.stderr
    for process in range(2):
        lines = said(done, process)
        assert lines[0] == "from the first: {'process': 0, 'pi': 3.14}"
        assert lines[1] == f"arrays: {[[7.0] * 3] * 2} 0"
    came, went = zip(*([float(word) for word in said(done, process)[-1].split()[-2:]] for process in range(2)))
    assert min(went) >= max(came) > min(came) + 0.5


def test_what_the_first_process_saved_all_restore_as_it_lay():
    done = together(SCENES, "--scene=restored")
    assert done.returncode == 0, done.stderr
    for process in range(2):
        assert said(done, process) == ["3 {'rows': 5} [0.0, 1.0, 2.0, 3.0] True"]


def test_a_signal_to_one_stops_all_after_the_same_step():
    done = together(SCENES, "--scene=stop", processes=3)
    assert done.returncode == 0, done.stderr
    (line,) = {tuple(said(done, process)) for process in range(3)}
    found = re.fullmatch(r"stopped after step (\d+); it was told 15", line[0])
    assert 20 <= int(found[1]) < 10_000


@pytest.mark.parametrize(
    ("scene", "code", "why"),
    [
        ("error", 2, "there is no such thing"),
        ("crash", 1, "division by zero"),
        ("interrupted", 143, "stopped by SIGTERM"),
    ],
)
@pytest.mark.parametrize("who", [0, 1])
def test_an_error_in_one_ends_the_others_with_its_reason(scene, code, why, who):
    done = together(SCENES, f"--scene={scene}", f"--who={who}")
    assert done.returncode == code, done.stderr
    other = complaint(done, 1 - who)
    assert re.fullmatch(rf"error: process {who} on \S+ ended: {why}", other)
    assert why in done.stderr.replace(other, "")


def test_processes_that_were_started_unlike_each_other_end_at_the_first_stage_that_differs():
    done = together(SCENES, "--scene=unlike")
    assert done.returncode == 2, done.stderr
    assert said(done, 1) == ["with 0.1"]
    assert complaint(done, 1).startswith("error: train: train.learning_rate differ between this host and the first")


@pytest.mark.parametrize("scene", ["killed", "killed_in_program"])
def test_a_process_that_vanishes_ends_the_others_with_a_plain_line(scene):
    done = together(SCENES, f"--scene={scene}", "--peer_seconds=6", grace_seconds=600)
    assert done.returncode == 137
    assert re.fullmatch(r"error: lost process 1 on \S+: no sign of life for 6 s", complaint(done, 0))


def test_a_first_process_that_vanishes_ends_the_others():
    """In JAX's words, mostly: its client ends the process as soon as the coordination service is gone."""
    done = together(SCENES, "--scene=killed", "--who=0", "--peer_seconds=6", grace_seconds=600)
    assert done.returncode == 137
    assert re.search("error: lost process 0|the leader task was preempted/died", done.stderr), done.stderr


def test_a_process_that_stalls_is_named_and_ends_the_job():
    done = together(SCENES, "--scene=stall", "--stall_seconds=6", grace_seconds=600)
    assert done.returncode == 75
    for process in range(2):
        assert re.fullmatch(
            r"error: no process has made progress for 6 s; process 1 on \S+ is furthest behind .*--stall_seconds\)",
            complaint(done, process),
        )


# The launcher

HELLO = """
import sys, time
number = int(sys.argv[-1].partition("=")[2])
print("hello from", number, sys.argv[1], flush=True)
print("mind", file=sys.stderr, flush=True)
if number == int(sys.argv[2]):
    sys.exit(3)
time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def hello(tmp_path):
    path = tmp_path / "hello.py"
    path.write_text(HELLO)
    return path


def test_lines_come_out_with_the_number_of_their_process(hello):
    done = together(hello, "there", -1, 0, processes=3)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{n}] hello from {n} there" for n in range(3)]
    assert sorted(done.stderr.splitlines()) == [f"[{n}] mind" for n in range(3)]


def test_one_that_fails_takes_the_others_with_it(hello):
    done = together(hello, "there", 1, 3600, processes=3, grace_seconds=0.5)
    assert done.returncode == 3


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_reaches_all(hello, signum):
    process = subprocess.Popen(
        [sys.executable, str(LAUNCHER), "--processes=2", "--devices=1", "--", str(hello), "there", "-1", "3600"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(2):
        assert "hello" in process.stdout.readline()
    process.send_signal(signum)
    process.communicate(timeout=100)  # of the launcher's own grace of 120
    assert process.returncode == 128 + signum
