"""Readers: the bytes of a file to documents, chosen by the file's suffix.

A reader is registered under its suffixes; a file with any other suffix is read as plain text:

    @register(".log")
    def read_log(path: Path, data: bytes) -> list[Document]: ...
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cartridges_jax.corpus.documents import Document

# Path (for names and messages) and content to documents.
Reader = Callable[[Path, bytes], list[Document]]

READERS: dict[str, Reader] = {}


def register(*suffixes: str) -> Callable[[Reader], Reader]:
    """Registers a reader for files with one of the suffixes (lower case, with the dot)."""

    def add(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(suffixes, reader))
        return reader

    return add


def reader_for(path: Path) -> Reader:
    """The reader of a file's suffix, or the one of plain text."""
    return READERS.get(path.suffix.lower(), READERS[".txt"])


def document_name(path: Path) -> str:
    """The file's name without a suffix that only names its format ("Apache-2.0" keeps its ".0")."""
    return path.stem if path.suffix.lower() in READERS else path.name


# Members register themselves.
from cartridges_jax.corpus.readers import plain, squad  # noqa: E402, F401
