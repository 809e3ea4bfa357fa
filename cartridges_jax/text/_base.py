"""The base of every tokenizer, which keeps control tokens out of text.

Control tokens (such as `<|im_start|>`) are kept out of the backend that splits text altogether, so ordinary
text that spells one can never become one; only `encode(text, control=True)` looks for them. That is the
rule llama.cpp calls `parse_special`.
"""

from __future__ import annotations

import abc
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal

from cartridges_jax.errors import UserError

# What precedes a piece of text: nothing, a control token, or other text. It matters where a tokenizer writes
# a space of its own before a text (Llama 2, Mistral).
Place = Literal["start", "control", "text"]

# Tokens that can only be a turn's or a text's borders, whatever a file says of their type: files are known
# that call `<start_of_turn>` an ordinary word. HTML tags, which Gemma matches in any text, stay out of it.
_LOOKS_LIKE_CONTROL = re.compile(
    r"<\|.+\|>|<｜.+｜>|<(start|end)_of_\w+>|<unused\d+>|<(bos|eos|pad|unk|mask|2mass)>|\[@BOS@\]|\[multimodal\]"
)


class Tokenizer(abc.ABC):
    """Text to token ids and back; immutable, hence safe to share between threads.

    Attributes:
      vocab_size: number of ids, control tokens included; the model may have more.
      bos_id, eos_id: ids that the model names, or None. BOS is never added by `encode`.
      control_tokens: text to id of the control tokens.
      fingerprint: SHA-256 (hex) of everything that decides the ids: equal means interchangeable.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        control_tokens: Mapping[str, int],
        *,
        fingerprint: str,
        bos_id: int | None,
        eos_id: int | None,
        verbatim: Mapping[str, int] | None = None,
        found_in_text: Mapping[str, int] | None = None,
    ):
        """
        Args:
          tokens: the vocabulary, by id.
          control_tokens: text to id.
          verbatim: further tokens that decode to their own text, without the backend.
          found_in_text: those of `verbatim` that the backend does not find in text by itself.
        """
        self._tokens = list(tokens)
        self.vocab_size = len(self._tokens)
        self.control_tokens = dict(control_tokens)
        self.fingerprint = fingerprint
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._control_ids = frozenset(self.control_tokens.values())
        self._atomic_ids = self._control_ids | frozenset((verbatim or {}).values())
        self._atoms = {**(found_in_text or {}), **self.control_tokens}
        self._plain_splitter = _any_of(found_in_text or {})
        self._control_splitter = _any_of(self._atoms)

    @abc.abstractmethod
    def _encode_run(self, text: str, place: Place) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of text without control tokens."""

    @abc.abstractmethod
    def _decode_run(self, ids: list[int], place: Place) -> str:
        """Text of ids of the vocabulary, without control tokens."""

    def token_text(self, token_id: int) -> str:
        """The vocabulary's entry for one id: a control token's text, else whatever the vocabulary writes."""
        return self._tokens[token_id]

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids of `text`; never adds BOS or EOS.

        Args:
          text: any string. Bytes that a byte-level vocabulary lacks (SmolLM2: six ASCII control characters)
            are dropped before merging, as in the model's own tokenizer; llama.cpp drops them after it.
          control: whether text that spells a control token becomes that token; only for trusted text.
        """
        return self._encode(text, self._control_splitter if control else self._plain_splitter, "start")[0]

    def encode_with_offsets(self, text: str, *, after: Place = "start") -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text)` and, for each token, the range of characters (start, end) that it covers.

        Both ends never decrease. Tokens that share the bytes of one character all cover it; a space that the
        tokenizer writes before the text covers nothing.

        Args:
          after: what precedes the text.
        """
        return self._encode(text, self._plain_splitter, after)

    def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
        """Text of token ids; incomplete UTF-8 becomes U+FFFD.

        The space that a tokenizer writes before a text (Llama 2, Mistral) is removed again. An id above
        the vocabulary is nothing, as in transformers: many models' embeddings have more rows than their
        vocabulary has tokens (Qwen), and a sampler may draw one of those.

        Raises:
          UserError: a negative id.
        """
        pieces: list[str] = []
        place: Place = "start"
        for atomic, run in groupby(self._known(ids), key=self._atomic_ids.__contains__):
            run = list(run)
            if atomic:
                pieces.extend(self._tokens[i] for i in run if not (skip_control and i in self._control_ids))
                place = "control" if run[-1] in self._control_ids else "text"
            else:
                pieces.append(self._decode_run(run, place))
                place = "text"
        return "".join(pieces)

    def _encode(self, text: str, atomic: re.Pattern | None, place: Place) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, token_id in _split(text, atomic, self._atoms):
            if token_id is not None:
                ids.append(token_id)
                offsets.append((start, end))
                place = "control" if token_id in self._control_ids else "text"
                continue
            new_ids, new_offsets = self._encode_run(text[start:end], place)
            ids.extend(new_ids)
            offsets.extend(new_offsets if start == 0 else ((a + start, b + start) for a, b in new_offsets))
            place = "text"
        return ids, offsets

    def _known(self, ids: Iterable[int]) -> Iterator[int]:
        for token_id in map(int, ids):
            if token_id < 0:
                raise UserError(f"token id {token_id} is negative; the tokens are damaged, make them again")
            if token_id < self.vocab_size:
                yield token_id


def looks_like_control(token: str) -> bool:
    """Returns whether a token's text says that it marks a border, so that no text may produce it."""
    return _LOOKS_LIKE_CONTROL.fullmatch(token) is not None


def sha256_of(value: object) -> str:
    """SHA-256 (hex) of a value's JSON."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def _split(text: str, atomic: re.Pattern | None, ids: Mapping[str, int]) -> Iterator[tuple[int, int, int | None]]:
    """(start, end, id) of each atomic token in `text`, and (start, end, None) of the text between."""
    position = 0
    for match in atomic.finditer(text) if atomic else ():
        if match.start() > position:
            yield position, match.start(), None
        yield match.start(), match.end(), ids[match.group()]
        position = match.end()
    if position < len(text):
        yield position, len(text), None


def _any_of(tokens: Iterable[str]) -> re.Pattern | None:
    """Matches any of the tokens, the longest where several start; None if there are none."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
