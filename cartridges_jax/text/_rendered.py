"""From a template's text, with the contents marked in it, to token ids and spans.

* Control tokens are looked for in the template's parts only, so content that spells `<|im_end|>` stays
  text, whatever is next to it.
* Everything between two control tokens, template and content together, is encoded as one piece, so BPE
  merges across their borders exactly as in the plain rendering.
* The contents' places, mapped through character offsets, give each content's token span. A token that
  covers characters on both sides of a border belongs to the content.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from cartridges_jax.text._regions import Markers
from cartridges_jax.text.tokenizer import Place, Tokenizer


@dataclass(frozen=True)
class Rendered:
    """Messages as the model reads them.

    Attributes:
      token_ids: the ids, T of them.
      spans: per message, the range [start, end) of `token_ids` that holds its content.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]


class Encoder:
    """Encodes marked text with a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        names = sorted(filter(None, tokenizer.control_tokens), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def place_after(self, text: str) -> Place:
        """The place that follows a template's text: after a control token, or after other text."""
        if not text:
            return "start"
        return "control" if any(text.endswith(name) for name in self._tokenizer.control_tokens if name) else "text"

    def __call__(self, marked: str, markers: Markers, messages: range, *, after: Place = "start") -> Rendered:
        """Token ids, and the spans of those messages.

        Args:
          messages: the numbers of the messages that are in the text.
          after: what precedes the text.
        """
        ids: list[int] = []
        spans: dict[int, tuple[int, int]] = {}
        text, contents = "", {}  # since the last control token

        def flush() -> None:
            new_ids, offsets = self._tokenizer.encode_with_offsets(text, after=after)
            for number, (start, end) in contents.items():
                spans[number] = _token_span(offsets, start, end, shift=len(ids))
            ids.extend(new_ids)

        numbers, regions, gaps = markers.split(marked)
        for number, content, gap in zip([*numbers, None], [*regions, ""], gaps):
            position = 0
            for match in self._control.finditer(gap):
                text += gap[position : match.start()]
                position = match.end()
                flush()
                ids.append(self._tokenizer.control_tokens[match.group()])
                text, contents, after = "", {}, "control"
            text += gap[position:]
            if number is not None:
                contents[number] = (len(text), len(text) + len(content))
                text += content
        flush()
        return Rendered(ids, [spans[number] for number in messages])


def _token_span(offsets: list[tuple[int, int]], start: int, end: int, *, shift: int) -> tuple[int, int]:
    """The range of tokens that cover any of the characters [start, end), moved by `shift`."""
    stop = bisect_left(offsets, end, key=lambda offset: offset[0])
    first = bisect_right(offsets, start, key=lambda offset: offset[1]) if start < end else stop
    return shift + first, shift + stop
