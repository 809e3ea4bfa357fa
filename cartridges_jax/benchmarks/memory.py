"""Peak memory of a task in a process of its own.

The high-water mark is reset after a few steps, and freed memory is returned to the system,
so that it shows the memory of the steady work (weights, libraries and program included) and
not that of reading a file or compiling. It is read from /proc:
`ru_maxrss` of a child also counts its parent's memory at its start
(tests/test_benchmarks.py::test_peak_memory_is_the_child_s_own). Linux only; elsewhere None.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_bytes(module: str, task: dict[str, Any]) -> int | None:
    """Runs `python -m module TASK` and returns the {"peak_bytes"} that it printed.

    Raises:
      RuntimeError: the process failed; with the end of its stderr.
    """
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(task)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def reset_high_water_mark() -> None:
    """Resets the peak, after a garbage collection."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def report_high_water_mark() -> None:
    """Prints the peak since the reset, for `peak_bytes`."""
    peak = None
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    print(json.dumps({"peak_bytes": peak}))
