"""The frame of every program: flags in, plain messages and exit codes out instead of tracebacks."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
from absl import app, flags

from cartridges_jax.errors import Interrupted, UserError


def run_program(
    main: Callable[..., None] | None = None,
    *,
    fields: str = "cartridges_jax/pipeline/config.py lists the fields",
    argv: Sequence[str] | None = None,
    command: Callable[[], Callable[..., None]] | None = None,
) -> None:
    """Parses the flags, runs `main` and exits.

    Args:
      main: called without arguments.
      fields: where a user finds the config's fields, for the message about an unknown one.
      argv: the program's name and its arguments; by default `sys.argv`, which may hold flags alone.
      command: in place of `main`: defines its flags and returns its main function, which is called with the list of
        arguments that are not flags. Its docstring is its help text.

    Exit codes: 0; 2 for bad input, after one line on stderr; 128 + the signal's number
    when stopped by SIGINT or SIGTERM; 75 where another process of the job was lost.
    """

    run = main

    def parse(argv: list[str]) -> list[str]:
        nonlocal run
        if _wants_help(argv) and command is None:
            return app.parse_flags_with_usage(argv)
        try:
            if command is not None:
                # Config flags read the command line when they are defined.
                run = command()
                if _wants_help(argv):
                    print(f"{command.__doc__}\n\nflags:{flags.FLAGS.module_help(command.__module__)}")
                    sys.exit(0)
            return flags.FLAGS(argv)
        except UserError as error:
            # Of a config that takes a name, such as experiments/pods.py.
            _fail(str(error), error.exit_code)
        except (KeyError, AttributeError) as error:
            # What ml_collections raises for a field that the config does not have.
            name = next(iter(re.findall(r"\w+", str(error))), "")
            _fail(f"the config has no field {name!r}: {fields}")
        except (flags.Error, TypeError, ValueError) as error:
            _fail(str(error))

    def guarded(parsed: list[str]) -> None:
        if len(parsed) > 1 and command is None:
            _fail(f"unexpected argument {parsed[1]!r}: options are written --name=value")
        # Orbax tells of every file it writes.
        absl.logging.set_verbosity(absl.logging.WARNING)
        # Not needed by --help, and not free.
        from cartridges_jax.pipeline.compilation import keep_compilations

        keep_compilations()
        try:
            run() if command is None else run(parsed[1:])
        except UserError as error:
            _fail(str(error), error.exit_code)
        except Interrupted as stop:
            print(f"\n{stop}; the same command resumes from here", file=sys.stderr)
            _exit(stop.exit_code)
        except KeyboardInterrupt:
            print("\nstopped by SIGINT", file=sys.stderr)
            _exit(128 + signal.SIGINT)

    sys.excepthook = _report
    # JAX reports at every start which accelerators it did not find.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    app.run(guarded, argv=None if argv is None else list(argv), flags_parser=parse)


def run_from_flags(config: Any, workdir: str, job_flags: dict[str, Any]) -> dict[str, Any] | None:
    """Runs the pipeline as a program: with bars and messages in the terminal, stopped by SIGINT and SIGTERM.

    Args:
      config: the `ml_collections` config.
      job_flags: as `define_job_flags` gives them.

    Returns:
      The report, in process 0.
    """
    from cartridges_jax.parallel import start_job
    from cartridges_jax.pipeline.config import from_config_dict
    from cartridges_jax.pipeline.run import run
    from cartridges_jax.pipeline.signals import StopSignals
    from cartridges_jax.pipeline.terminal import TerminalReporter

    settings = from_config_dict(config)
    with start_job(**job_flags) as job:
        return run(settings, Path(workdir), job=job, reporter=TerminalReporter(), stopping=StopSignals)


def define_job_flags() -> Callable[[], dict[str, Any]]:
    """Defines the flags of a program that several processes may run together.

    Returns:
      A function that gives their values, as `parallel.start_job` takes them, once they are parsed.
    """
    distributed = flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "Whether other processes take part: auto looks for SLURM, Cloud TPU pods and Kubernetes.",
    )
    coordinator = flags.DEFINE_string("coordinator", "", "HOST:PORT at which process 0 listens.")
    num_processes = flags.DEFINE_integer("num_processes", None, "How many processes take part.", lower_bound=1)
    process_id = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
    peer_seconds = flags.DEFINE_float(
        "peer_seconds", 100.0, "Without a sign of life from another process, until the job ends."
    )
    stall_seconds = flags.DEFINE_float(
        "stall_seconds", 1800.0, "Without a step of any process (one may be compiled), until the job ends."
    )
    holders = (distributed, coordinator, num_processes, process_id, peer_seconds, stall_seconds)
    return lambda: {holder.name: holder.value for holder in holders}


def _wants_help(argv: list[str]) -> bool:
    asked = ("help", "helpfull", "helpshort", "helpxml")
    return any(argument.startswith("-") and argument.lstrip("-").split("=")[0] in asked for argument in argv[1:])


def _fail(message: str, code: int = UserError.exit_code) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    _exit(code)


def _report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Prints an unexpected error with its traceback; a connected process ends without waiting for the others."""
    sys.__excepthook__(kind, error, trace)
    if _connected():
        _exit(1)


def _connected() -> bool:
    """Whether this process has others to wait for at its end."""
    # Without importing JAX, which may be half loaded when an interrupt comes.
    is_initialized = getattr(sys.modules.get("jax.distributed"), "is_initialized", None)
    return is_initialized is not None and is_initialized()


def _exit(code: int) -> NoReturn:
    """Ends the process: at once if others are connected, for they may be where they cannot follow."""
    if _connected():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
