"""The disk: its free space, and syncing files before a rename."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from cartridges_jax.errors import UserError

_SLACK_BYTES = 1 << 20  # orbax's own files beside the arrays: tens of kilobytes


def absolute(directory: str | os.PathLike) -> pathlib.Path:
    # Links are followed: the directory that a link points to is replaced.
    return pathlib.Path(directory).expanduser().resolve()


def refuse_if_too_full(directory: pathlib.Path, num_bytes: int) -> None:
    """Refuses to write where the disk has too little room.

    Raises:
      UserError: naming the directory, the bytes needed and the bytes free.
    """
    if _free_bytes(directory) < num_bytes + _SLACK_BYTES:
        raise _too_full(directory, num_bytes)


@contextlib.contextmanager
def refusing_if_it_fills_up(directory: pathlib.Path, num_bytes: int) -> Iterator[None]:
    """Raises the same error where the disk fills up during the block."""
    try:
        yield
    except Exception as error:
        # Tensorstore's errors are ValueErrors that carry the system's words and no errno.
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise _too_full(directory, num_bytes) from error
        raise


def _too_full(directory: pathlib.Path, num_bytes: int) -> UserError:
    return UserError(
        f"{directory}: saving needs {num_bytes / 1e6:.1f} MB and the disk has "
        f"{_free_bytes(directory) / 1e6:.1f} MB free (what was saved before is intact); free some "
        "space or choose another directory"
    )


def _free_bytes(directory: pathlib.Path) -> int:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def fsync_tree(root: pathlib.Path) -> None:
    for path in [root, *root.rglob("*")]:
        fsync(path)


def fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
