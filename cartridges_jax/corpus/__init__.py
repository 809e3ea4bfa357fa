"""The text a cartridge is made from: documents, their readers, tokens, sentences and chunks."""

from cartridges_jax.corpus.chunks import Chunk
from cartridges_jax.corpus.documents import Corpus, Document
from cartridges_jax.corpus.read import QUICKSTART, read_corpus
from cartridges_jax.corpus.tokenized import TokenizedCorpus, TokenizedDocument, tokenize_corpus

__all__ = [
    "QUICKSTART", "Chunk", "Corpus", "Document", "TokenizedCorpus", "TokenizedDocument", "read_corpus", "tokenize_corpus",
]  # fmt: skip
