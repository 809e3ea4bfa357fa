"""A document: the text a cartridge is made from, and how it is read from a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cartridges_jax.errors import UserError

# What the document that ships with the package is called in place of a path.
QUICKSTART = "quickstart"


@dataclass(frozen=True)
class Document:
    """A text and the name it goes by in reports."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 text: the corpus hash that cartridges and reports carry."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def read_document(path: str | Path) -> Document:
    """Reads a plain text or Markdown file, or `QUICKSTART`; the document is named after the file, without its suffix.

    Blank space around the text is dropped: small models answer noticeably worse behind a
    system message that ends in a line break.

    Raises:
      UserError: as `read_text` does.
    """
    if path == QUICKSTART:
        with resources.as_file(resources.files("cartridges_jax") / "assets" / "quickstart.md") as shipped:
            return read_document(shipped)
    path = Path(path)
    return Document(path.stem, read_text(path).strip())


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark and with `\\n` line ends.

    Line ends are made equal so that the same text has the same hash on every system.

    Raises:
      UserError: if the file is missing, a directory, unreadable, binary, not UTF-8, or blank.
    """
    path = Path(path)
    data = _read_bytes(path)
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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give one text or Markdown file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
