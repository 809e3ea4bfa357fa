"""A: the side of self-study that writes the user's messages (paper section 4.1).

How A is prompted is a setting, because it depends on the model: `chat` gives it the chunk
as a system message and a seed prompt as a turn, as in the paper; `completion` shows a
small model examples and one sentence of the chunk, without the chat template.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.selfstudy.seeds import FAMILIES, Pattern

STYLES = ("completion", "chat")

_SHORTEST, _LONGEST = 3, 40
_LONGEST_QUESTION = 18


@dataclasses.dataclass(frozen=True)
class Request:
    """One message to be written.

    Attributes:
      family: a key of `FAMILIES`.
      variant: picks among the family's instructions or openings.
      sentence: the sentence of the chunk that it is about.
      sentence_index: which sentence of the document that is.
    """

    family: str
    variant: int
    sentence: str
    sentence_index: int


def is_usable(text: str, family: str) -> bool:
    """Whether a written message is kept: not a fragment, not an essay, not an echo of the examples."""
    pattern = FAMILIES[family].pattern
    num_words = len(text.split())
    if pattern.is_question:
        well_formed = text.endswith("?") and _SHORTEST <= num_words <= _LONGEST_QUESTION
    else:
        well_formed = _SHORTEST <= num_words <= _LONGEST
    return well_formed and all(text != example for _, example in pattern.examples)


class Writer:
    """Writes user messages with the model itself.

    Attributes:
      style: "completion" or "chat".
    """

    def __init__(
        self,
        model: Model,
        *,
        style: str,
        max_tokens: int,
        sampling_settings: sampling.Sampling,
        heartbeat: Callable[[], None] = lambda: None,
    ):
        if style not in STYLES:
            raise UserError(f"study.writer {style!r}: choose one of {', '.join(STYLES)}")
        self._model = model
        self.style = style
        self._max_tokens = max_tokens
        self._sampling = sampling_settings
        self._heartbeat = heartbeat
        self._prefilled: dict[Pattern, KVPrefix] = {}

    def write(self, requests: Sequence[Request], chunk_prefix: KVPrefix | None, *, seed: int) -> list[str | None]:
        """One message per request, None where the model wrote nothing usable.

        Args:
          chunk_prefix: the chunk as a system message; only the chat style reads it.
          seed: with a request's place in the list it determines what is drawn.
        """
        texts: list[str | None] = [None] * len(requests)
        for number, family in enumerate(FAMILIES):
            places = [i for i, request in enumerate(requests) if request.family == family]
            if not places:
                continue
            chosen = [requests[i] for i in places]
            if self.style == "completion":
                written = self._complete(FAMILIES[family].pattern, chosen, seed * len(FAMILIES) + number)
            else:
                written = self._chat(chosen, chunk_prefix, seed * len(FAMILIES) + number)
            for place, text in zip(places, written):
                if is_usable(text, family):
                    texts[place] = text
        return texts

    def _complete(self, pattern: Pattern, requests: Sequence[Request], seed: int) -> list[str]:
        encode = self._model.tokenizer.encode
        openings = [pattern.openings[request.variant % len(pattern.openings)] for request in requests]
        prompts = []
        for request, opening in zip(requests, openings):
            text = f"Fact: {request.sentence}\n{pattern.label}:"
            prompts.append(encode(f"{text} {opening}" if opening else text))
        generations = sampling.generate_tokens(
            self._model,
            prompts,
            self._examples(pattern),
            max_tokens=self._max_tokens,
            sampling=self._sampling,
            stop_ids=self._line_ends,
            seed=seed,
            on_progress=lambda finished: self._heartbeat(),
        )
        return [
            f"{opening}{self._first_line(generation.token_ids)}".strip()
            for opening, generation in zip(openings, generations)
        ]

    def _chat(self, requests: Sequence[Request], chunk_prefix: KVPrefix | None, seed: int) -> list[str]:
        prompts = []
        for request in requests:
            instructions = FAMILIES[request.family].instructions
            turn = {"role": "user", "content": instructions[request.variant % len(instructions)]}
            prompts.append(self._model.chat.render_continuation([turn], add_generation_prompt=True).token_ids)
        generations = sampling.generate_tokens(
            self._model,
            prompts,
            chunk_prefix,
            max_tokens=self._max_tokens,
            sampling=self._sampling,
            seed=seed,
            on_progress=lambda finished: self._heartbeat(),
        )
        return [self._model.tokenizer.decode(g.token_ids).strip().strip('"') for g in generations]

    def _examples(self, pattern: Pattern) -> KVPrefix:
        """The pattern's examples as a prefix, shared by all that is written after them."""
        if pattern not in self._prefilled:
            lines = [pattern.header, ""]
            for sentence, message in pattern.examples:
                lines += [f"Fact: {sentence}", f"{pattern.label}: {message}", ""]
            token_ids = self._model.tokenizer.encode("\n".join(lines) + "\n")
            self._prefilled[pattern] = sampling.prefill(self._model, token_ids)
        return self._prefilled[pattern]

    @functools.cached_property
    def _line_ends(self) -> list[int]:
        """The tokens that end a line, and the model's own stop tokens."""
        tokenizer = self._model.tokenizer
        with_break = [i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])]
        return sorted({*with_break, *self._model.chat.stop_ids})

    def _first_line(self, token_ids: Sequence[int]) -> str:
        return re.split(r"\n", self._model.tokenizer.decode(token_ids), maxsplit=1)[0].rstrip()
