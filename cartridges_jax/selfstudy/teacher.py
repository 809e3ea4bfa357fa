"""The teacher, which answers in self-study: a protocol, and a registry to choose from by name (`study.teacher`).

A teacher is a class with the method `reply`, registered under a name:

    @register("echo")
    class Echo:
        def __init__(self, model, argument, heartbeat): ...
        def reply(self, context, conversations, *, max_tokens, temperature, top_logprobs=0, seed=0): ...

`Completes`, `Scores` and `Spread` are capabilities that a teacher may have besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from cartridges_jax.data.schema import TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model

Messages = Sequence[Mapping[str, str]]


class Reply(NamedTuple):
    """The next message of a conversation, or the rest of a text.

    Attributes:
      text: the message; control tokens are not part of it.
      token_ids: [T] the ids as they were generated, in the student's vocabulary; the end of turn, if it came, included.
      top_logprobs: the k most likely tokens at each of the T places at temperature 1; None if none were asked for.
      stop_reason: "stop" (the message ended) or "length" (it was cut at `max_tokens`).
    """

    text: str
    token_ids: list[int]
    top_logprobs: TopLogprobs | None
    stop_reason: str


class Teacher(Protocol):
    """Writes the next message of conversations about a text.

    Attributes:
      name: stored with every conversation.
    """

    name: str

    def reply(
        self,
        context: str,
        conversations: Sequence[Messages],
        *,
        max_tokens: int,
        temperature: float,
        top_logprobs: int = 0,
        seed: int = 0,
    ) -> list[Reply]:
        """The assistant's next message in every conversation.

        Args:
          context: the text that all of the conversations are about, shown as a system message.
          conversations: each a list of messages ("role", "content") that ends with the user's.
          max_tokens: the most tokens of a reply.
          temperature: 0 is greedy.
          top_logprobs: k, the number of log-probabilities per token; 0 for none.
          seed: with a conversation's place in the list it determines what is drawn.
        """
        ...


@runtime_checkable
class Completes(Protocol):
    """A teacher that can continue raw text, without a chat template; the "completion" writer needs it."""

    def complete(
        self,
        head: str,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[Reply]:
        """Continues `head` + prompt, for every prompt, to the end of the line.

        Args:
          head: the text that all prompts share; it and a prompt are tokenised separately.
          top_k: draws among the k most likely tokens; 0 among all.
        """
        ...


@runtime_checkable
class Scores(Protocol):
    """A teacher that can give log-probabilities of messages that are already written."""

    def score(self, context: str, conversations: Sequence[Messages], *, top_logprobs: int) -> list[TopLogprobs]:
        """The teacher's most likely tokens at every token of each conversation's last message."""
        ...


@runtime_checkable
class Spread(Protocol):
    """A teacher that several processes may have to call together."""

    def process_groups(self) -> list[tuple[int, ...]]:
        """Groups of process indices, each of which can use the teacher by itself; empty if every process can."""
        ...

    def on_group(self, number: int) -> Teacher:
        """The teacher as the processes of one group use it, while the other groups do other work."""
        ...


Maker = Callable[[Model, str, Callable[[], None]], Teacher]
TEACHERS: dict[str, Maker] = {}
_M = TypeVar("_M", bound=Maker)


def register(name: str) -> Callable[[_M], _M]:
    """Adds a teacher to `TEACHERS`.

    It is called with the student's model, the part of `study.teacher` after a colon ("" without one), and a function
    to call every few seconds during long work; what that function raises ends the call.
    """

    def add(maker: _M) -> _M:
        TEACHERS[name] = maker
        return maker

    return add


def make_teacher(name: str, model: Model, heartbeat: Callable[[], None] = lambda: None) -> Teacher:
    """The teacher with this name, which may have an argument after a colon.

    Raises:
      UserError: no teacher has the name.
    """
    check_name(name)
    kind, _, argument = name.partition(":")
    return TEACHERS[kind](model, argument, heartbeat)


def check_name(name: str) -> None:
    """Raises UserError if no teacher has the name."""
    if name.partition(":")[0] not in TEACHERS:
        raise UserError(f"study.teacher {name!r}: choose one of {', '.join(TEACHERS)}")
