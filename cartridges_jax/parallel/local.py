"""A job of several processes on this machine, for tests and for debugging programs for many hosts."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO


def run_locally(
    command: Sequence[str], *, num_processes: int, num_devices: int = 0, grace_seconds: float = 120.0
) -> int:
    """Runs a Python program as a job of several processes, and returns when all have ended.

    Every line that a process writes is printed after its number, such as "[1] ". SIGINT and
    SIGTERM are passed on to all. When one process fails, the others have `grace_seconds` to
    report why and end by themselves, before they are killed.

    Args:
      command: the program's file and arguments; the flags of `start_job` are added to them.
      num_devices: CPU devices of each process; 0 leaves the devices as they are.

    Returns:
      The exit code of the first process that failed, 128 + its number if a signal ended it;
      0 if none did.
    """
    variables, commands = _commands(command, num_processes, num_devices)
    processes = [
        subprocess.Popen(
            one, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", process_group=0,
        )
        for one in commands
    ]  # fmt: skip
    readers = [
        threading.Thread(target=_copy_lines, args=(f"[{number}] ", stream, out))
        for number, process in enumerate(processes)
        for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()

    def pass_on(signum: int, frame) -> None:
        for process in processes:
            process.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(processes, grace_seconds)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for process in processes:
            # With the processes that it started, which would keep its pipes open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for reader in readers:
            reader.join()


def dry_run(command: Sequence[str], *, num_processes: int, num_devices: int = 0) -> str:
    """The shell commands that `run_locally` would start, a line for each process; the port differs every time."""
    variables, commands = _commands(command, num_processes, num_devices)
    settings = [f"{name}={value}" for name, value in variables.items()]
    return "\n".join(shlex.join(["env", *settings, *one] if settings else one) for one in commands)


def _commands(command: Sequence[str], num_processes: int, num_devices: int) -> tuple[dict[str, str], list[list[str]]]:
    """Variables for all processes, and the command of each; they connect through a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)} if num_devices else {}
    flags = ["--distributed=on", f"--coordinator=localhost:{port}", f"--num_processes={num_processes}"]
    return variables, [[sys.executable, *command, *flags, f"--process_id={number}"] for number in range(num_processes)]


def _wait(processes: Sequence[subprocess.Popen], grace_seconds: float) -> int:
    failed, give_up_at = 0, float("inf")
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < give_up_at:
        if not failed and (failed := next(filter(None, codes), 0)):
            give_up_at = time.monotonic() + grace_seconds
        time.sleep(0.05)
    failed = failed or next(filter(None, codes), 0)
    return failed if failed >= 0 else 128 - failed


def _copy_lines(prefix: str, stream: TextIO, out: TextIO) -> None:
    for line in stream:
        out.write(f"{prefix}{line}")
        out.flush()
