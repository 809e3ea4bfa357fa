"""The cache directory, and hashes of files that are read once and then remembered in it.

The directory is $CARTRIDGES_JAX_CACHE, else $XDG_CACHE_HOME/cartridges_jax, else ~/.cache/cartridges_jax.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from cartridges_jax.files import write_atomically
from cartridges_jax.formats.tensors import sha256_of_file

# Smaller files are hashed in less time than their hash is looked up.
_SMALL_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_dir() -> Path:
    """The directory that holds fetched model files and remembered hashes; it need not exist yet."""
    if chosen := os.environ.get("CARTRIDGES_JAX_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cartridges_jax"


def cached_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hex, from the cache where the file has not changed since it was last read.

    A file counts as unchanged while its real path, size, modification time and inode stay the same, so a start does
    not read all weights a second time. Files below 1 MiB are always read. A cache that cannot be written, or a damaged entry, only costs the reading.

    Raises:
      OSError: the file cannot be read.
    """
    path = Path(path).resolve()
    before = _identity(path)
    if before["size"] < _SMALL_BYTES:
        return sha256_of_file(path)
    entry = cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    if (known := _remembered(entry, before)) is not None:
        return known
    found = sha256_of_file(path)
    # A file that is written while it is hashed has no hash to remember.
    if _identity(path) == before:
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(entry, json.dumps({**before, "sha256": found}) + "\n")
    return found


def _identity(path: Path) -> dict[str, str | int]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _remembered(entry: Path, identity: dict[str, str | int]) -> str | None:
    try:
        content = json.loads(entry.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    found = content.pop("sha256", None)
    intact = isinstance(found, str) and _SHA256.fullmatch(found)
    return found if intact and content == identity else None
