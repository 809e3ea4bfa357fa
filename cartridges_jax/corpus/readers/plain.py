"""Plain text and Markdown: one document per file."""

from __future__ import annotations

from pathlib import Path

from cartridges_jax.corpus.documents import Document
from cartridges_jax.corpus.files import decode
from cartridges_jax.corpus.readers import document_name, register


@register(".txt", ".text", ".md", ".markdown", ".rst")
def read_plain_text(path: Path, data: bytes) -> list[Document]:
    """Reads UTF-8 text as it is.

    Blank space around the text is dropped: small models answer noticeably worse after a
    system message that ends in a line break.

    Raises:
      UserError: binary, not UTF-8, or blank.
    """
    return [Document(document_name(path), decode(data, path).strip(), source=str(path))]
