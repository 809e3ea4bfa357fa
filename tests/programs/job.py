"""Processes of one job that meet, stop, fail, vanish or stall; run by tests/test_job.py through launch/local_multiprocess.py.

    python tests/programs/job.py --scene=SCENE FLAGS_OF_A_JOB

SCENE is values, restored, stop, error, crash, interrupted, unlike, killed, killed_in_program or stall.
"""

from __future__ import annotations

import os
import signal
import time

from absl import flags

from cartridges_jax.errors import Interrupted, UserError
from cartridges_jax.pipeline.program import define_job_flags, run_program

_SCENE = flags.DEFINE_string("scene", None, "What happens.")
_WHO = flags.DEFINE_integer("who", 1, "To which process.")
_JOB = define_job_flags()


def values(job):
    import numpy as np

    print("from the first:", job.from_first(lambda: {"process": job.process, "pi": 3.14}))
    arrays = job.arrays_from_first({"a": np.full((2, 3), 7 - job.process, np.float32), "b": np.int32(job.process)})
    print("arrays:", arrays["a"].tolist(), int(arrays["b"]))
    if job.process == _WHO.value:
        time.sleep(1)
    # What a process prints comes out when it ends, behind a wait for all: only clocks tell who waited.
    came = time.monotonic()
    job.wait_for_all()
    print("came and went:", came, time.monotonic())


def restored(job):
    import tempfile
    from pathlib import Path

    import numpy as np

    from cartridges_jax import parallel
    from cartridges_jax.distill.checkpoints import SharedCheckpoints

    where = parallel.sharding(parallel.make_mesh("fsdp:-1"), ("slots",), (4,))
    with tempfile.TemporaryDirectory() as directory:
        shared = Path(job.from_first(lambda: directory))
        for number in range(2):
            checkpoints = SharedCheckpoints(shared, 2, job)
            if number == 0:
                checkpoints.save(3, {"x": parallel.place(np.arange(4, dtype=np.float32), where)}, {"rows": 5})
            else:
                found, extra = checkpoints.restore({"x": parallel.place(np.zeros(4, np.float32), where)})
                print(checkpoints.latest, extra, parallel.fetch(found["x"]).tolist(), found["x"].sharding == where)
            checkpoints.close()
            job.wait_for_all()


def stop(job):
    signum = None
    for step in range(1, 10_000):
        # Processes that do not keep step with each other.
        time.sleep(0.01 * (1 + job.process))
        if step == 20 and job.process == _WHO.value:
            signum = signal.SIGTERM
            job.note(signum)
        if job.stops_here(signum):
            print(f"stopped after step {step}; it was told {job.stop_wanted(signum)}")
            return


def walk(job, end):
    """Steps without end, but that one process meets with something in the fifth."""
    for step in range(10_000):
        job.made_progress()
        time.sleep(0.02)
        if step == 5 and job.process == _WHO.value:
            end()


def error(job):
    def end():
        raise UserError("there is no such thing")

    walk(job, end)


def crash(job):
    walk(job, lambda: 1 / 0)


def interrupted(job):
    def end():
        raise Interrupted(signal.SIGTERM)

    walk(job, end)


def unlike(job):
    import tempfile
    from pathlib import Path

    from cartridges_jax.pipeline.workdir import Stage

    with tempfile.TemporaryDirectory() as directory:
        for rate in (0.1, 0.1 * (1 + job.process)):
            Stage(Path(directory), "train", {"train.learning_rate": rate, "seed": 0}, job)
            print("with", rate, flush=True)


def killed(job):
    walk(job, lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_in_program(job):
    import jax
    import jax.numpy as jnp

    from cartridges_jax import parallel

    mesh = parallel.make_mesh("data:-1")

    def step():
        ones = parallel.zeros(mesh, ("rows",), (jax.device_count(),), jnp.float32) + 1
        return float(jnp.sum(ones))

    print("sum:", step(), flush=True)
    job.wait_for_all()
    if job.process == _WHO.value:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        step()


def stall(job):
    job.wait_for_all()
    if job.process == _WHO.value:
        time.sleep(3600)
    job.wait_for_all()


def main() -> None:
    from cartridges_jax.parallel import start_job

    with start_job(**_JOB()) as job:
        globals()[_SCENE.value](job)


if __name__ == "__main__":
    run_program(main)
