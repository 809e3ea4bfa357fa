"""Trains a cartridge on a corpus and writes its report.

    python launch/train.py --config=experiments/quickstart.py --workdir=runs/quickstart
    python launch/train.py --config=experiments/quickstart.py --config.corpus=my.txt \
        --config.questions=my.jsonl --workdir=runs/mine

The same command resumes a run that was interrupted. On several hosts the command is started once on each: as it is
under SLURM, on Cloud TPU pods and in Kubernetes jobs, elsewhere with

        --coordinator=HOST:PORT --num_processes=4 --process_id=0        # … 3; HOST is that of process 0
"""

from absl import flags
from ml_collections import config_flags

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.program import define_job_flags, run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, e.g. experiments/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, e.g. runs/quickstart.")
_JOB = define_job_flags()


def main() -> None:
    if _CONFIG.value is None or not _WORKDIR.value:
        raise UserError("give --config=experiments/quickstart.py and --workdir=runs/quickstart (or your own)")
    # Imported here, so that --help and typing errors answer at once.
    from cartridges_jax.pipeline.program import run_from_flags

    run_from_flags(_CONFIG.value, _WORKDIR.value, _JOB())


if __name__ == "__main__":
    run_program(main)
