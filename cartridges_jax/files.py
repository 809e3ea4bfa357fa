"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Writes a file so that other processes see the old content or the new one, also after a crash.

    The content is written and fsynced under another name in the same directory, `.NAME.` with a random ending, and
    renamed. A process that is killed before the rename leaves that file behind.

    The file gets the umask's mode, as `open` gives it. (`tempfile` makes files that only their owner can read, which
    shuts the other users out of a shared directory.)

    Args:
      path: an existing file is replaced.
      content: bytes, text (written as UTF-8), or a function that writes to the binary file it is given.

    Raises:
      OSError: the directory is missing, not writable, or full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8"))
            elif isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
