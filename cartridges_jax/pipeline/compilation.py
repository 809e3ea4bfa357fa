"""Compiled programs kept on disk, so that a second start need not compile them again.

JAX finds an entry by the program, its options and the versions of JAX and XLA, but on
CPUs not by the processor: an entry made on one type may stop another with an illegal
instruction. So every type has a directory of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax

from cartridges_jax.formats.wheels import cache_dir

# Below this, reading an entry saves next to nothing.
_MIN_COMPILE_SECONDS = 0.2

# Beyond this, what was not used for longest goes.
_MAX_BYTES = 2 * 2**30


def keep_compilations() -> None:
    """Turns JAX's compilation cache on; to be called before anything is compiled.

    JAX_COMPILATION_CACHE_DIR, if set, is what counts, and an empty value turns it off. Off
    too where the directory cannot be written.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = cache_dir() / "xla" / processor()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(directory, os.W_OK):
        return
    wanted = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": _MIN_COMPILE_SECONDS,
    }
    # Without this package JAX can bound no cache and refuses to try.
    if importlib.util.find_spec("filelock"):
        wanted["jax_compilation_cache_max_size"] = _MAX_BYTES
    for name, value in wanted.items():
        if name.upper() not in os.environ:
            # The environment is for programs that this one starts: here JAX has read it, with the config file.
            os.environ[name.upper()] = str(value)
            jax.config.update(name, value)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A short name of the processor's type and instruction sets."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    kept = ("flags", "features", "model name", "cpu family", "model", "stepping", "cpu part")
    facts = {line.strip() for line in lines if line.split(":")[0].strip().lower() in kept}
    text = "\n".join([platform.machine(), platform.processor(), *sorted(facts)])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
