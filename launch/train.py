"""Takes a document to a trained cartridge and its report.

    python launch/train.py --config=experiments/quickstart.py --workdir=runs/quickstart
    python launch/train.py --config=experiments/quickstart.py --config.corpus=my.txt \
        --config.questions=my.jsonl --workdir=runs/mine

The same command after an interruption goes on where it stopped.
"""
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.program import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, e.g. experiments/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything, e.g. runs/quickstart.")


def main() -> None:
    if _CONFIG.value is None or not _WORKDIR.value:
        raise UserError("give --config=experiments/quickstart.py and --workdir=runs/quickstart (or your own)")
    # Imported here, so that --help and typing errors answer at once.
    from cartridges_jax.pipeline.config import from_config_dict
    from cartridges_jax.pipeline.run import run

    run(from_config_dict(_CONFIG.value), Path(_WORKDIR.value))


if __name__ == "__main__":
    run_program(main)
