"""Runs a program as several processes on this machine, each with CPU devices of its own.

    python launch/local_multiprocess.py --processes=2 --devices=4 -- \
        launch/train.py --config=experiments/quickstart.py --config.mesh=data:-1 --config.train.rows_per_step=8 \
        --workdir=runs/two

Every line of output begins with the number of its process. When one process fails, all end. --dry_run prints the
commands.
"""

import sys

from absl import app, flags

from cartridges_jax.parallel.local import dry_run, run_locally

_PROCESSES = flags.DEFINE_integer("processes", 2, "Number of processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices", 4, "CPU devices of each process; 0 uses the devices that there are.", lower_bound=0
)
_GRACE = flags.DEFINE_float(
    "grace_seconds",
    120.0,
    "Seconds for the other processes to end after one has failed; more than their --peer_seconds.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the commands.")


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        app.usage(shorthelp=True, detailed_error="give a program and its flags after --", exitcode=2)
    if _DRY_RUN.value:
        print(dry_run(argv[1:], num_processes=_PROCESSES.value, num_devices=_DEVICES.value))
        return
    sys.exit(
        run_locally(argv[1:], num_processes=_PROCESSES.value, num_devices=_DEVICES.value, grace_seconds=_GRACE.value)
    )


if __name__ == "__main__":
    app.run(main)
