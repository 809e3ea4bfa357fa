"""Byte-level BPE tokenizers, built from the vocabulary and merges that a GGUF file carries.

Matches llama.cpp token by token (tests/test_text.py, tests/test_byte_level.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer

from cartridges_jax.errors import UserError
from cartridges_jax.text._base import Place, Tokenizer, looks_like_control, sha256_of

# llama.cpp's token types (enum llama_token_type).
_CONTROL = 3
_USER_DEFINED = 4


def _gpt2() -> pre_tokenizers.PreTokenizer:
    """GPT-2's split into words."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Each digit alone, then GPT-2's split into words, as in the tokenizer.json of SmolLM2 and Granite 3."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _tiktoken(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """The split of Llama 3 and of Qwen2, from their tokenizer.json; they differ in how digits group."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = _tiktoken(r"\p{N}{1,3}")
_QWEN2 = _tiktoken(r"\p{N}")
# The values of `tokenizer.ggml.pre` that are known, as llama.cpp's llama-vocab.cpp reads them. A wrong
# splitter gives plausible, slightly wrong tokens, so nothing is assumed for another value; "default" is
# what a converter writes that did not know the model's.
_PRE_TOKENIZERS = {
    "smollm": _smollm,
    "refact": _smollm,  # Granite 3
    "gpt-2": _gpt2,
    "olmo": _gpt2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _LLAMA3,  # OLMo 2, Phi-4
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
# Llama 3 takes a word that is in the vocabulary as it is, without merging.
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3"}


class ByteLevelBPE(Tokenizer):
    """BPE over GPT-2's byte alphabet."""

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        *,
        pre: str,
        token_types: Sequence[int] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ):
        """
        Args:
          tokens: the vocabulary, by id; ordinary tokens in GPT-2's byte alphabet.
          merges: "left right" pairs in order of priority.
          pre: how text is split before merging, a value of `tokenizer.ggml.pre`.
          token_types: llama.cpp's type per token (3 control, 4 user-defined, found in any text).

        Raises:
          UserError: `pre` is unknown, or the merges do not fit the vocabulary.
        """
        if pre not in _PRE_TOKENIZERS:
            raise UserError(f"unknown pre-tokenizer {pre!r} (tokenizer.ggml.pre); known: {', '.join(_PRE_TOKENIZERS)}")
        types = token_types or [1] * len(tokens)
        if len(types) != len(tokens):
            raise UserError(f"{len(tokens)} tokens but {len(types)} token types; the model file is damaged")
        control, user_defined = {}, {}
        for token_id, (token, kind) in enumerate(zip(tokens, types)):
            if kind == _CONTROL or (kind == _USER_DEFINED and looks_like_control(token)):
                control[token] = token_id
            elif kind == _USER_DEFINED:
                user_defined[token] = token_id
        super().__init__(
            tokens,
            control,
            fingerprint=sha256_of([list(tokens), list(merges), pre, list(types)]),
            bos_id=bos_id,
            eos_id=eos_id,
            verbatim=user_defined,
            found_in_text=user_defined,
        )
        self._bpe = _bpe(tokens, merges, pre, set(control) | set(user_defined))

    @classmethod
    def from_metadata(cls, metadata: Mapping) -> ByteLevelBPE:
        """The tokenizer of a GGUF file's metadata, which names it "gpt2".

        Raises:
          KeyError: a part is missing.
          UserError: as from the constructor.
        """
        return cls(
            metadata["tokenizer.ggml.tokens"],
            metadata["tokenizer.ggml.merges"],
            pre=metadata["tokenizer.ggml.pre"],
            token_types=metadata.get("tokenizer.ggml.token_type"),
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
        )

    def _encode_run(self, text: str, place: Place) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._bpe.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _decode_run(self, ids: list[int], place: Place) -> str:
        return self._bpe.decode(ids, skip_special_tokens=False)


def _bpe(tokens: Sequence[str], merges: Sequence[str], pre: str, atomic: set[str]) -> BPETokenizer:
    """The merging backend without atomic tokens, so that no merge can produce one."""
    vocabulary = {token: i for i, token in enumerate(tokens) if token not in atomic}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if atomic:
        pairs = [pair for pair in pairs if "".join(pair) not in atomic and atomic.isdisjoint(pair)]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _WHOLE_WORDS_FIRST)
        tokenizer = BPETokenizer(model)
    except Exception as error:  # the Rust side raises bare Exceptions
        raise UserError(f"the vocabulary and merges do not fit ({error}); the model file is damaged") from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
