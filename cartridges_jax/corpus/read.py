"""A corpus from files: one file, a folder, a glob pattern, a list of these, or standard input."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from cartridges_jax.corpus.documents import Corpus, Document
from cartridges_jax.corpus.files import STDIN, read_bytes
from cartridges_jax.corpus.readers import READERS, reader_for
from cartridges_jax.errors import UserError

# The name, in place of a path, of the document that the package ships.
QUICKSTART = "quickstart"
# The files that mark a run's directory and a cartridge.
_RECORDS = ("run.json", "cartridge.json")


def read_corpus(source: str | Path | Sequence[str | Path]) -> Corpus:
    """Reads every document that `source` names, each file once.

    Args:
      source: a file of any suffix, a folder (all files below it that a reader is registered for), a glob pattern
        (`**` crosses folders), "-" for standard input, `QUICKSTART`, or several of these as a list or a
        comma-separated string. The name of an existing file is always that file.

    Raises:
      UserError: nothing found, or a file that its reader refuses.
    """
    documents: list[Document] = []
    for path in _paths(source):
        documents += reader_for(path)(path, read_bytes(path))
    return Corpus(tuple(_with_unique_ids(documents)))


def _paths(source: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(source, str) and source == QUICKSTART:
        with resources.as_file(resources.files("cartridges_jax") / "assets" / "quickstart.md") as shipped:
            return [shipped]
    if isinstance(source, (str, Path)):
        return _expanded(str(source))
    if not source:
        raise UserError("the corpus names no file: give at least one")
    return [path for part in source for path in _paths(part)]


def _expanded(source: str) -> list[Path]:
    if not source.strip():
        raise UserError("the corpus names no file: give a file, a folder, a glob pattern or a list of these")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _files_of(path)
    if source == STDIN or path.exists():
        return [path]
    if glob.has_magic(source):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if files := [file for file in found if file.is_file()]:
            return files
    if "," in source:
        return [path for part in source.split(",") for path in _paths(part.strip())]
    if glob.has_magic(source):
        raise UserError(f"no file matches {source}; check the pattern")
    raise UserError(f"{source} does not exist; check the path")


def _files_of(folder: Path) -> list[Path]:
    """The readable files below a folder, in order of their paths, without hidden ones."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not _is_result(file, folder)
    )
    if not files:
        raise UserError(f"{folder} holds no file with one of the suffixes {', '.join(READERS)}; give another folder")
    return files


def _is_result(file: Path, folder: Path) -> bool:
    """Returns True for files of a run or a cartridge that was written into the folder."""
    inside = [parent for parent in file.parents if parent != folder and parent.is_relative_to(folder)]
    return any((parent / record).exists() for parent in inside for record in _RECORDS)


def _with_unique_ids(documents: list[Document]) -> list[Document]:
    """Documents that share a name, such as the README of several folders, are told apart by their path."""
    counts = Counter(document.id for document in documents)
    shared = [document.source for document in documents if counts[document.id] > 1]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(s)) for s in shared]) if shared and all(shared) else ""
    found = []
    for document in documents:
        if counts[document.id] > 1 and document.source:
            document = dataclasses.replace(document, id=f"{os.path.relpath(document.source, root)}: {document.id}")
        found.append(document)
    return found
