"""Measures this library against others on this machine.

    python launch/benchmark.py --config=experiments/benchmarks/train_step.py --workdir=runs/bench_train_step
    python launch/benchmark.py --config=experiments/benchmarks/decode.py --config.batches='(1, 8)' --workdir=runs/bench_decode

The last line is the result as JSON; the workdir has the same as a file, and a figure.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.program import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The benchmark, e.g. experiments/benchmarks/decode.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results, e.g. runs/bench_decode.")


def main() -> None:
    if _CONFIG.value is None or not _WORKDIR.value:
        raise UserError("give --config=experiments/benchmarks/decode.py (or another) and --workdir=runs/bench_decode")
    from cartridges_jax.benchmarks.run import run

    run(_CONFIG.value, Path(_WORKDIR.value))


if __name__ == "__main__":
    run_program(main, fields="the settings classes in cartridges_jax/benchmarks/ list the fields")
