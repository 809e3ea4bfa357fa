"""Byte-level BPE tokenizers, built from the vocabulary and merges that a GGUF file carries.

Control tokens (such as `<|im_start|>`) are kept out of the BPE model altogether, so ordinary text that
spells one can never become one; only `encode(text, control=True)` looks for them. That is the rule
llama.cpp calls `parse_special`. Matches llama.cpp token by token (tests/test_text.py).
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from tokenizers import Tokenizer as BPETokenizer
from tokenizers import decoders, models, pre_tokenizers

from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import GGUFFile

# llama.cpp's token types (enum llama_token_type).
_CONTROL = 3
_USER_DEFINED = 4


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Each digit alone, then GPT-2's split into words, as in SmolLM2's own tokenizer.json."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


# The values of `tokenizer.ggml.pre` that are known. A wrong splitter gives plausible, slightly wrong
# tokens, so there is no default.
_PRE_TOKENIZERS = {"smollm": _smollm}


class Tokenizer:
    """Text to token ids and back. Immutable, hence safe to share between threads.

    Attributes:
      vocab_size: number of ids, control tokens included.
      bos_id, eos_id: ids that the model names, or None. BOS is never added by `encode`.
      control_tokens: text to id of the control tokens.
      fingerprint: SHA-256 (hex) of everything that decides the ids: equal means interchangeable.
    """

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
            raise UserError(
                f"unknown pre-tokenizer {pre!r} (tokenizer.ggml.pre); known: {', '.join(_PRE_TOKENIZERS)}"
            )
        types = token_types or [1] * len(tokens)
        if len(types) != len(tokens):
            raise UserError(f"{len(tokens)} tokens but {len(types)} token types; the model file is damaged")
        self._tokens = list(tokens)
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.control_tokens = _of_type(_CONTROL, tokens, types)
        self._user_defined = _of_type(_USER_DEFINED, tokens, types)
        self._control_ids = frozenset(self.control_tokens.values())
        self._atomic_ids = self._control_ids | frozenset(self._user_defined.values())
        self._plain_splitter = _any_of(self._user_defined)
        self._control_splitter = _any_of({**self._user_defined, **self.control_tokens})
        self._bpe = _bpe(tokens, merges, pre, set(self.control_tokens) | set(self._user_defined))
        self.fingerprint = _sha256([list(tokens), list(merges), pre, list(types)])

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer described by a GGUF file's metadata.

        Raises:
          UserError: the file has no byte-level BPE vocabulary, or an unknown pre-tokenizer.
        """
        metadata = file.metadata
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UserError(
                f"{file.path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) is supported, "
                "choose a model with such a tokenizer"
            )
        try:
            return cls(
                metadata["tokenizer.ggml.tokens"],
                metadata["tokenizer.ggml.merges"],
                pre=metadata.get("tokenizer.ggml.pre", "default"),
                token_types=metadata.get("tokenizer.ggml.token_type"),
                bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
                eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
            )
        except KeyError as error:
            raise UserError(f"{file.path}: metadata {error} is missing; convert the model again") from error
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error

    def token_text(self, token_id: int) -> str:
        """The vocabulary's entry for one id: a control token's text, or bytes in GPT-2's alphabet."""
        return self._tokens[token_id]

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids of `text`; never adds BOS or EOS.

        Args:
          text: any string. Bytes that the vocabulary lacks (SmolLM2: six ASCII control characters) are
            dropped before merging, as in the model's own tokenizer; llama.cpp drops them after it.
          control: whether text that spells a control token becomes that token; only for trusted text.
        """
        return self._encode(text, self._control_splitter if control else self._plain_splitter)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text)` and, for each token, the range of characters (start, end) that it covers.

        Both ends never decrease. Tokens that share the bytes of one character all cover it.
        """
        return self._encode(text, self._plain_splitter)

    def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
        """Text of token ids; incomplete UTF-8 becomes U+FFFD.

        Raises:
          UserError: an id outside the vocabulary.
        """
        pieces = []
        for atomic, run in groupby(map(int, ids), key=self._atomic_ids.__contains__):
            run = list(run)
            if not atomic:
                self._require_known(run)
                pieces.append(self._bpe.decode(run, skip_special_tokens=False))
            else:
                pieces.extend(self._tokens[i] for i in run if not (skip_control and i in self._control_ids))
        return "".join(pieces)

    def _encode(self, text: str, atomic: re.Pattern | None) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, token_id in _split(text, atomic, {**self._user_defined, **self.control_tokens}):
            if token_id is not None:
                ids.append(token_id)
                offsets.append((start, end))
                continue
            encoding = self._bpe.encode(text[start:end], add_special_tokens=False)
            ids.extend(encoding.ids)
            offsets.extend(encoding.offsets if start == 0 else ((a + start, b + start) for a, b in encoding.offsets))
        return ids, offsets

    def _require_known(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise UserError(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size}; "
                    "were these tokens made by another model?"
                )


def _bpe(tokens: Sequence[str], merges: Sequence[str], pre: str, atomic: set[str]) -> BPETokenizer:
    """The merge machine alone, without atomic tokens, so that no merge can produce one."""
    vocabulary = {token: i for i, token in enumerate(tokens) if token not in atomic}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if atomic:
        pairs = [pair for pair in pairs if "".join(pair) not in atomic and atomic.isdisjoint(pair)]
    try:
        tokenizer = BPETokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the Rust side raises bare Exceptions
        raise UserError(f"the vocabulary and merges do not fit ({error}); the model file is damaged") from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split(
    text: str, atomic: re.Pattern | None, ids: Mapping[str, int]
) -> Iterator[tuple[int, int, int | None]]:
    """(start, end, id) of each atomic token in `text`, and (start, end, None) of the text between."""
    position = 0
    for match in atomic.finditer(text) if atomic else ():
        if match.start() > position:
            yield position, match.start(), None
        yield match.start(), match.end(), ids[match.group()]
        position = match.end()
    if position < len(text):
        yield position, len(text), None


def _of_type(wanted: int, tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    return {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind == wanted}


def _any_of(tokens: Iterable[str]) -> re.Pattern | None:
    """Matches any of the tokens, the longest where several start; None if there are none."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()
