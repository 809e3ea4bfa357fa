"""Documents, and the corpus that a cartridge is made from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence

from cartridges_jax.corpus.questions import Question
from cartridges_jax.errors import UserError

# Between a document's title and its text, and between documents, where several are shown as one text.
BREAK = "\n\n"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with a name.

    Attributes:
      name: the document's title in prompts and reports.
      text: the text itself.
      source: the path or address that it was read from; "" for a text from memory.
      id: unique within a corpus; the name by default.
      questions: human questions that came with the document (SQuAD).
    """

    name: str
    text: str
    source: str = ""
    id: str = ""
    questions: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self.name)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 text: the hash that cartridges and reports carry."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of one cartridge, in order.

    Raises:
      UserError: no documents, or two with the same id.
    """

    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        if not self.documents:
            raise UserError("the corpus has no documents: give at least one file with text in it")
        seen: set[str] = set()
        for document in self.documents:
            if document.id in seen:
                raise UserError(f"two documents have the id {document.id!r}: rename one of them or leave one out")
            seen.add(document.id)

    @classmethod
    def from_text(cls, text: str, name: str = "text") -> Corpus:
        """A corpus of one document from memory."""
        return cls((Document(name, text.strip()),))

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def name(self) -> str:
        """The only document's name, or the first one's and how many follow."""
        first, others = self.documents[0].name, len(self) - 1
        return f"{first} and {others} other{'s' if others > 1 else ''}" if others else first

    @property
    def sha256(self) -> str:
        """Hash of the only document, or of the list of all documents' names and hashes."""
        if len(self) == 1:
            return self.documents[0].sha256
        listed = json.dumps([[document.name, document.sha256] for document in self])
        return hashlib.sha256(listed.encode("ascii")).hexdigest()

    @property
    def text(self) -> str:
        """The whole corpus as one text: a single document as it is, several each after its name."""
        if len(self) == 1:
            return self.documents[0].text
        return BREAK.join(f"{document.name}{BREAK}{document.text}" for document in self)

    @property
    def questions(self) -> list[Question]:
        """The human questions that came with the documents."""
        return [question for document in self for question in document.questions]

    def select(self, names: str | Sequence[str]) -> Corpus:
        """The documents with the given names; case and underscores do not matter.

        Args:
          names: a name, a comma-separated list of names, or a sequence; empty selects all.

        Raises:
          UserError: a name that no document has; the message lists those there are.
        """
        if not names:
            return self
        by_name: dict[str, list[Document]] = {}
        for document in self:
            for key in {_plain(document.name), _plain(document.id)}:
                by_name.setdefault(key, []).append(document)
        if isinstance(names, str):
            names = [names] if _plain(names) in by_name else names.split(",")
        chosen: list[Document] = []
        for name in names:
            if _plain(name) not in by_name:
                known = ", ".join(document.name for document in self)
                raise UserError(f"the corpus has no document {name.strip()!r}; it has: {known}")
            chosen += by_name[_plain(name)]
        return Corpus(tuple(chosen))


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
