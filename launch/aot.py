"""Compiles a run's programs ahead of time for hardware that you do not have: memory, bounds and the best mesh.

    python launch/aot.py --config=experiments/pods.py:llama31_8b_v5e16
    python launch/aot.py --config=experiments/pods.py:llama31_8b_v5e16 --sweep
    python launch/aot.py --config=experiments/pods.py:llama31_8b_v5p16 --scaling

It needs the compiler (pip install -e '.[tpu]', or '.[cuda]' for H100s), but no accelerator and no weights.
The last lines are JSON, one for each program.
"""

import os

from absl import flags
from ml_collections import config_flags

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.program import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run, e.g. experiments/pods.py:llama31_8b_v5e16.")
_PROGRAMS = flags.DEFINE_list(
    "programs",
    [],
    "Programs to compile: train, prefill and decode by default; whole_text is evaluation's read of the whole text.",
)
_SWEEP = flags.DEFINE_bool("sweep", False, "Try all meshes of the topology.")
_SCALING = flags.DEFINE_bool("scaling", False, "Project the train step from 1 to 512 chips.")


def main() -> None:
    if _CONFIG.value is None:
        raise UserError("give --config=experiments/pods.py:llama31_8b_v5e16 (or another)")
    from cartridges_jax.aot.run import run
    from cartridges_jax.pipeline.config import from_config_dict
    from cartridges_jax.pipeline.pod import workload_of

    run(
        workload_of(from_config_dict(_CONFIG.value)),
        programs=_PROGRAMS.value,
        sweep=_SWEEP.value,
        scaling=_SCALING.value,
    )


if __name__ == "__main__":
    # The compiler gets a description of the devices; JAX need not look for any.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run_program(main)
