"""A: the side of self-study that writes the user's messages (paper section 4.1).

How A is prompted is a setting, because it depends on the model: `chat` gives it the chunk
as a system message and a seed prompt as the user's message, as in the paper; `completion` shows a
small model examples and one sentence of the chunk, without the chat template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from cartridges_jax.errors import UserError
from cartridges_jax.selfstudy.seeds import FAMILIES, Pattern
from cartridges_jax.selfstudy.settings import SynthesisSettings
from cartridges_jax.selfstudy.streams import MESSAGES, stream_seed
from cartridges_jax.selfstudy.teacher import Completes, Teacher


@dataclasses.dataclass(frozen=True)
class Request:
    """One message to be written.

    Attributes:
      family: a key of `FAMILIES`.
      variant: picks among the family's instructions or openings.
      sentence: the sentence of the chunk that it is about.
      sentence_index: the index of the sentence in the corpus's `sentences`.
    """

    family: str
    variant: int
    sentence: str
    sentence_index: int


class WrittenMessage(NamedTuple):
    """A message of A's.

    Attributes:
      text: without white space at its ends; may be empty.
      is_cut: whether it ended at the length limit.
    """

    text: str
    is_cut: bool


class Writer:
    """Writes user messages with the teacher."""

    def __init__(self, teacher: Teacher, settings: SynthesisSettings):
        """
        Raises:
          UserError: a teacher that cannot do what `settings.writer` needs.
        """
        if settings.writer == "completion" and not isinstance(teacher, Completes):
            raise UserError(
                f"study.writer='completion' continues raw text, which the teacher {teacher.name!r} cannot do: "
                "use study.writer=chat, or study.teacher=local"
            )
        self._teacher = teacher
        self._settings = settings

    def write(self, requests: Sequence[Request], context: str, *, seed: int, batch: int) -> list[WrittenMessage]:
        """One message per request.

        Args:
          context: the chunk, the system message of the chat style.
          seed, batch: with a request's place in the list they determine what is drawn.
        """
        messages: dict[int, WrittenMessage] = {}
        for family in FAMILIES:
            places = [i for i, request in enumerate(requests) if request.family == family]
            if not places:
                continue
            own = [requests[i] for i in places]
            family_seed = stream_seed(seed, batch, MESSAGES, family)
            if self._settings.writer == "completion":
                written = self._complete(FAMILIES[family].pattern, own, family_seed)
            else:
                written = self._chat(own, context, family_seed)
            messages.update(zip(places, written, strict=True))
        return [messages[i] for i in range(len(requests))]

    def _complete(self, pattern: Pattern, requests: Sequence[Request], seed: int) -> list[WrittenMessage]:
        assert isinstance(self._teacher, Completes)
        openings = [pattern.openings[request.variant % len(pattern.openings)] for request in requests]
        prompts = []
        for request, opening in zip(requests, openings, strict=True):
            prompt = f"Fact: {request.sentence}\n{pattern.label}:"
            prompts.append(f"{prompt} {opening}" if opening else prompt)
        replies = self._teacher.complete(
            examples_text(pattern),
            prompts,
            max_tokens=self._settings.writer_max_tokens,
            temperature=self._settings.writer_temperature,
            top_k=self._settings.writer_top_k,
            seed=seed,
        )
        return [
            WrittenMessage(f"{opening}{reply.text}".strip(), reply.stop_reason == "length")
            for opening, reply in zip(openings, replies, strict=True)
        ]

    def _chat(self, requests: Sequence[Request], context: str, seed: int) -> list[WrittenMessage]:
        conversations = []
        for request in requests:
            instructions = FAMILIES[request.family].instructions
            content = instructions[request.variant % len(instructions)]
            conversations.append([{"role": "user", "content": content}])
        replies = self._teacher.reply(
            context,
            conversations,
            max_tokens=self._settings.writer_max_tokens,
            temperature=self._settings.writer_temperature,
            seed=seed,
        )
        return [WrittenMessage(reply.text.strip().strip('"'), reply.stop_reason == "length") for reply in replies]


def examples_text(pattern: Pattern) -> str:
    """The text that all prompts of a pattern continue: its header and its examples."""
    lines = [pattern.header, ""]
    for sentence, message in pattern.examples:
        lines += [f"Fact: {sentence}", f"{pattern.label}: {message}", ""]
    return "\n".join(lines) + "\n"
