"""Chat templates: from messages to token ids, with the tokens of every message's content.

`_regions` tells which parts of a rendering the template wrote and which the messages did; `_rendered` makes
tokens of it, so that no content makes a control token and each content has its span.

A cartridge replaces the system message, so a rendering can be cut in two after it: `system_prefix` and
`render_continuation`, which together are, as text, the whole rendering. There are three kinds of templates:

* The system message is a turn of its own (ChatML, Llama 3, Qwen, SmolLM): the cut is at its end.
* It is written into the first user turn (Llama 2, Gemma 3, Mistral): the cut is where the user's own content
  starts. Text on both sides of the cut is encoded separately, so no token covers the cut.
* It is refused (Gemma 2) or written into the last turn (later Mistral, which drops it if that is an answer).
  A cartridge needs a fixed beginning, so the system message is folded into the first user turn as Gemma 3
  does it: content, blank line, user's content. `render` folds only what the template does not take.

What depends on the day or on a choice is fixed, since a cartridge must stay what it was trained for:
`strftime_now` gives 26 July 2024, the default that Llama 3's templates name, and `enable_thinking` is passed
as chosen. With `thinking=False` a generation prompt holds whatever the template writes to skip thinking
(Qwen3, SmolLM3: an empty think block), and answers are written, and trained on, after it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.text._jinja import compile_template
from cartridges_jax.text._regions import Markers, Turn, ends_of_thinking, mark
from cartridges_jax.text._rendered import Encoder, Rendered
from cartridges_jax.text.chat_source import PLAIN_TEMPLATE, source_in_directory
from cartridges_jax.text.tokenizer import Tokenizer

Message = Mapping[str, str]

# Stands for any content where only the template's own text around it matters.
_PROBE = "Xx"
# Between a system message and the user's content, where the template leaves it to us.
_FOLD = "\n\n"


class ChatTemplate:
    """A model's chat template, bound to its tokenizer.

    Messages are dicts with the strings "role" and "content"; other keys are ignored. Every method raises
    UserError when the template refuses the messages or changes their contents.

    Attributes:
      source: the Jinja text.
      thinking: whether the model is asked to think before it answers, where its template has a choice.
      is_plain: whether this is the built-in template for models that have none (`PLAIN_TEMPLATE`).
      end_of_turn_id: the token that ends an assistant's turn.
      stop_ids: the tokens after which sampling stops: end of turn, EOS and those of the model's
        generation_config.json; without a chat template every token of newlines alone, since vocabularies
        have tokens for several.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, thinking: bool = False, *, stop_ids: Iterable[int] = ()):
        """
        Args:
          source: the Jinja text; an empty one is the plain template.
          stop_ids: further tokens that end an answer.

        Raises:
          UserError: `source` is no valid template, or no token ends an assistant's turn.
        """
        source = source if source.strip() else PLAIN_TEMPLATE
        self.source = source
        self.thinking = thinking
        self.is_plain = source == PLAIN_TEMPLATE
        self._tokenizer = tokenizer
        self._template = compile_template(source)
        self._ends_of_thinking = ends_of_thinking(source)
        self._variables = {
            name: tokenizer.token_text(token_id)
            for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
            if token_id is not None
        }
        self._encode = Encoder(tokenizer)
        self.end_of_turn_id = self._find_end_of_turn()
        ends = _newline_ids(tokenizer) if self.is_plain else {self.end_of_turn_id}
        self.stop_ids = frozenset({self.end_of_turn_id, *ends, *stop_ids, tokenizer.eos_id} - {None})

    @classmethod
    def from_gguf(cls, file: GGUFFile, tokenizer: Tokenizer, thinking: bool = False) -> ChatTemplate:
        """The template in a GGUF file's metadata; the plain one if there is none.

        The ends of turns and messages that the metadata numbers (`eot`, `eom`) end answers too, as in llama.cpp.

        Raises:
          UserError: it is not usable.
        """
        source = file.metadata.get("tokenizer.chat_template")
        ends = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
        try:
            return cls(source or PLAIN_TEMPLATE, tokenizer, thinking, stop_ids=[i for i in ends if i is not None])
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error

    @classmethod
    def from_directory(
        cls, path: str | Path, tokenizer: Tokenizer, thinking: bool = False, *, stop_ids: Iterable[int] = ()
    ) -> ChatTemplate:
        """The template in a Hugging Face directory; the plain one if there is none.

        Args:
          stop_ids: further tokens that end an answer.

        Raises:
          UserError: it is not usable, or a file is damaged.
        """
        source = source_in_directory(Path(path))
        try:
            return cls(source or PLAIN_TEMPLATE, tokenizer, thinking, stop_ids=stop_ids)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
        """The whole conversation, with what the template writes before it (BOS, default system message)."""
        try:
            marked, markers = self._mark(messages, add_generation_prompt)
        except UserError:
            if not messages or messages[0].get("role") != "system" or self._system_turn != "folded":
                raise
            marked, markers = self._mark(messages, add_generation_prompt, fold=True)
        return self._encode(marked, markers, range(len(messages)))

    def render_continuation(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> Rendered:
        """The conversation without BOS and system message, for use after a KV prefix that holds both.

        It is what follows `system_prefix` in the rendering of both, whatever the system message is.

        Raises:
          UserError: also if one of `messages` is a system message, or the first is not the user's where the
            template writes the system message into the user's turn.
        """
        if any(message.get("role") == "system" for message in messages):
            raise UserError("a continuation holds no system message, its prefix does; put the text into the prefix")
        head, rest, markers = self._cut(_PROBE, messages, add_generation_prompt)
        # The system message has number 0 and is not in the rest.
        after = self._encode.place_after(markers.removed(head))
        return self._encode(rest, markers, range(1, 1 + len(messages)), after=after)

    def same_text(self, token_ids: Sequence[int], others: Sequence[int]) -> bool:
        """Returns whether two renderings up to an answer are equal but for white space and the end of turn."""
        first, second = (
            "".join(self._tokenizer.decode(ids, skip_control=False).split())
            for ids in (token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids, others)
        )
        return first == second

    def system_prefix(self, content: str) -> Rendered:
        """The system message alone, the prefix of in-context learning.

        To shorten it to a number of tokens, cut within `spans[0]` and keep the closing tokens after it.
        """
        head, _, markers = self._cut(content, [{"role": "user", "content": _PROBE}], False)
        return self._encode(head, markers, range(1))

    def default_head(self) -> list[int]:
        """The tokens that the template itself writes before a first user message; may be empty."""
        user = {"role": "user", "content": _PROBE}
        _, turn, markers = self._cut(_PROBE, [user], False)
        whole, own = self._mark([user], False)
        turn, whole = markers.removed(turn), own.removed(whole)
        if not whole.endswith(turn):
            raise UserError("this chat template writes the first user turn differently when there is a system message")
        return self._encode(whole[: len(whole) - len(turn)], own, range(0)).token_ids

    @functools.cached_property
    def _system_turn(self) -> str:
        """Where the system message goes: "own", "first" (into the user's) or "folded" (by us)."""
        messages = _probes("system", "user", "assistant", "user")
        markers = self._markers(messages)
        whole = self._try_mark(messages, markers)
        if whole is None:
            return "folded"
        alone = self._try_mark(messages[:1], markers)
        if alone is not None and whole.startswith(alone):
            return "own"
        pair = self._try_mark(messages[:2], markers)
        first_user = markers.opening(1)
        if markers.split(whole)[0] == [0, 1, 2, 3] and pair is not None:
            if whole.split(first_user)[0] == pair.split(first_user)[0]:
                return "first"
        return "folded"

    def _cut(self, system: str, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, str, Markers]:
        """The marked rendering up to the end of the system message, and the rest of it."""
        messages = [{"role": "system", "content": system}, *messages]
        place = self._system_turn
        if place == "own":
            whole, markers = self._mark(messages, add_generation_prompt)
            head = self._try_mark(messages[:1], markers)
        else:
            if len(messages) < 2 or messages[1].get("role") != "user":
                raise UserError("this chat template writes the system message into a user turn; begin with one")
            whole, markers = self._mark(messages, add_generation_prompt, fold=place == "folded")
            head = whole.split(markers.opening(1))[0]
        if head is None or not whole.startswith(head):
            raise UserError("this chat template writes the system message differently before these messages")
        return head, whole[len(head) :], markers

    def _find_end_of_turn(self) -> int:
        """The control token that directly follows an assistant's content, else EOS; a newline in plain text."""
        if self.is_plain:
            return self._tokenizer.encode_with_offsets("\n", after="text")[0][-1]
        rendered = self.render(_probes("user", "assistant"))
        closing = rendered.token_ids[rendered.spans[-1][1] :]
        if closing and closing[0] in self._tokenizer.control_tokens.values():
            return closing[0]
        if self._tokenizer.eos_id is None:
            raise UserError("the chat template closes no turn with a control token and the model names no EOS token")
        return self._tokenizer.eos_id

    def _markers(self, messages: Sequence[Message]) -> Markers:
        return Markers(len(messages), self.source, *(message["content"] for message in messages))

    def _try_mark(self, messages: list[Message], markers: Markers | None = None) -> str | None:
        """The marked rendering without a generation prompt, or None if the template does not like it."""
        try:
            turns = _turns(messages, fold=False)
            contents = [message["content"] for message in messages]
            return mark(
                self._runner(False), turns, contents, markers or self._markers(messages), self._ends_of_thinking
            )
        except UserError:
            return None

    def _mark(
        self, messages: Sequence[Message], add_generation_prompt: bool, *, fold: bool = False
    ) -> tuple[str, Markers]:
        """The rendered text with every content between its markers, and the markers."""
        messages = [_checked(message) for message in messages]
        markers = self._markers(messages)
        contents = [message["content"] for message in messages]
        turns = _turns(messages, fold=fold)
        marked = mark(self._runner(add_generation_prompt), turns, contents, markers, self._ends_of_thinking)
        if marked is None:
            raise UserError(
                "this chat template drops, repeats or rewrites message contents, so their tokens cannot be found; "
                f"the {len(messages)} messages have the roles {', '.join(m['role'] for m in messages) or 'none'}"
            )
        return marked, markers

    def _runner(self, add_generation_prompt: bool):
        return lambda messages: self._template(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=self.thinking,
            **self._variables,
        )


def _turns(messages: Sequence[Message], *, fold: bool) -> list[Turn]:
    """The turns to give a template: the messages, or a system message folded into the first user turn."""
    if not fold:
        return [(message["role"], [i]) for i, message in enumerate(messages)]
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise UserError("this chat template has no place for a system message without a user message after it; add one")
    return [("user", [0, _FOLD, 1]), *((m["role"], [i + 2]) for i, m in enumerate(messages[2:]))]


def _checked(message: Message) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f"a message needs the strings 'role' and 'content', got role {role!r} and content {content!r:.80}"
        )
    # The template writes roles as its own text, where control tokens count.
    if not re.fullmatch(r"[\w-]+", role):
        raise UserError(f"{role!r} is no role; use system, user or assistant")
    return {"role": role, "content": content}


def _probes(*roles: str) -> list[Message]:
    return [{"role": role, "content": _PROBE} for role in roles]


def _newline_ids(tokenizer: Tokenizer) -> set[int]:
    texts = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
    return {i for i, text in texts if text and not text.strip("\n")}
