"""Text files: bytes to text with equal line ends, and errors that name the remedy."""

from __future__ import annotations

import sys
from pathlib import Path

from cartridges_jax.errors import UserError

STDIN = "-"


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, a pipe or "-" (standard input).

    Raises:
      UserError: if the file is missing, a directory, unreadable, binary, not UTF-8, or blank.
    """
    return decode(read_bytes(path), path)


def decode(data: bytes, path: str | Path) -> str:
    """UTF-8 bytes as text, without a byte order mark and with `\\n` line ends.

    Line ends are unified so that the same text has the same hash on every system.

    Args:
      path: where the bytes come from, for messages.

    Raises:
      UserError: binary, not UTF-8, or blank.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path} > converted.txt")
    if (nul := data.find(b"\0")) >= 0:
        raise UserError(f"{path} is binary (a NUL at byte {nul}); give a UTF-8 text or Markdown file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            f"convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > converted.txt"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with some text in it")
    return text


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, a pipe or "-" (standard input).

    Raises:
      UserError: if it is missing, a directory or unreadable.
    """
    if str(path) == STDIN:
        return sys.stdin.buffer.read()
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give a file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
