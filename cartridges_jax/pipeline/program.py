"""What the launch programs share: plain messages and exit codes instead of tracebacks."""
from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

import absl.logging
from absl import app, flags

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.signals import Interrupted


def run_program(main: Callable[[], None], *, fields: str = "cartridges_jax/pipeline/config.py lists the fields") -> None:
    """Parses the flags, runs `main` and exits.

    Args:
      fields: where a user finds the config's fields, for the message about an unknown one.

    Exit codes: 0; 2 for bad input, after one line on stderr; 128 + the signal's number
    when stopped by SIGINT or SIGTERM.
    """

    def parse(argv: list[str]) -> list[str]:
        if _wants_help(argv):
            return app.parse_flags_with_usage(argv)
        try:
            return flags.FLAGS(argv)
        except (KeyError, AttributeError) as error:
            # What ml_collections raises for a field that the config does not have.
            name = str(error).strip("\"'")
            _fail(f"the config has no field {name!r}: {fields}")
        except (flags.Error, TypeError, ValueError) as error:
            _fail(str(error))

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}: options are written --name=value")
        # Orbax tells of every file it writes.
        absl.logging.set_verbosity(absl.logging.WARNING)
        # Not needed by --help, and not free.
        from cartridges_jax.pipeline.compilation import keep_compilations

        keep_compilations()
        try:
            main()
        except UserError as error:
            _fail(str(error))
        except Interrupted as stop:
            print(f"\nstopped by {stop}; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + stop.signum)
        except KeyboardInterrupt:
            print("\nstopped by SIGINT", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    # JAX reports at every start which accelerators it did not find.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def _wants_help(argv: list[str]) -> bool:
    return any(argument.lstrip("-").startswith("help") for argument in argv[1:])


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
