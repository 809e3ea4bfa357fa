"""Chat templates: from messages to token ids, with the tokens of every message's content.

A template is run twice, once as it is and once with each content between two marker characters that
occur nowhere else. The second text tells which parts the template wrote and which the user did:

* Control tokens are looked for in the template's parts only, so content that spells `<|im_end|>` stays
  text, whatever it stands next to.
* What lies between two control tokens, template and content together, is encoded as one piece with the
  markers taken out, so BPE merges across their borders exactly as in the plain rendering.
* The markers' places, mapped through character offsets, give each content's token span. A token that
  covers characters on both sides of a border belongs to the content.

The first text checks the second: if taking out the markers does not give it back, the template changes
contents. Trimming is understood (Llama 3 trims); any other change is refused in words, not guessed at.
"""
from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.text._jinja import compile_template
from cartridges_jax.text.tokenizer import Tokenizer

Message = Mapping[str, str]

# Stands for any content where only the template's own text around it matters.
_PROBE = "Xx"


@dataclass(frozen=True)
class Rendered:
    """Messages as the model reads them.

    Attributes:
      token_ids: the ids, T of them.
      spans: per message, the range [start, end) of `token_ids` that holds its content.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A model's chat template, bound to its tokenizer.

    Messages are dicts with the strings "role" and "content"; other keys are ignored. Every method raises
    UserError when the template refuses the messages or changes their contents.

    Attributes:
      source: the Jinja text.
      end_of_turn_id: the token that ends an assistant's turn.
      stop_ids: the tokens after which sampling stops: end of turn and EOS.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        """
        Raises:
          UserError: `source` is no valid template, or no token ends an assistant's turn.
        """
        self.source = source
        self._tokenizer = tokenizer
        self._template = compile_template(source)
        self._variables = {
            name: tokenizer.token_text(token_id)
            for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
            if token_id is not None
        }
        self.end_of_turn_id = self._find_end_of_turn()
        self.stop_ids = frozenset({self.end_of_turn_id, tokenizer.eos_id} - {None})

    @classmethod
    def from_gguf(cls, file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
        """The template in a GGUF file's metadata.

        Raises:
          UserError: the file has none, or it is not usable.
        """
        source = file.metadata.get("tokenizer.chat_template")
        if source is None:
            raise UserError(f"{file.path}: no chat template (tokenizer.chat_template); use an instruct model's file")
        try:
            return cls(source, tokenizer)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
        """The whole conversation: what the template puts in front (BOS, default system message) included."""
        return self._encode(self._mark(messages, add_generation_prompt), len(messages))

    def render_continuation(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> Rendered:
        """The conversation without BOS and system message, for use behind a KV prefix that holds both.

        It is what the template writes after a system message that stands in front.

        Raises:
          UserError: also if one of `messages` is a system message, or the template has no system
            message that stands by itself (Gemma writes it into the first user turn).
        """
        if any(message.get("role") == "system" for message in messages):
            raise UserError("a continuation holds no system message, its prefix does; put the text into the prefix")
        system = {"role": "system", "content": _PROBE}
        whole, markers = self._mark([system, *messages], add_generation_prompt)
        head, _ = self._mark([system], False, markers)
        if not whole.startswith(head):
            raise UserError(
                "this chat template does not write the system message as a part of its own, so a conversation "
                "cannot continue behind a prefix; use a model whose template does"
            )
        return self._encode((whole[len(head) :], markers), len(messages))

    def system_prefix(self, content: str) -> Rendered:
        """The system message alone: what in-context learning puts in front of a conversation.

        To shorten it to a number of tokens, cut within `spans[0]` and keep the closing tokens behind.
        """
        return self.render([{"role": "system", "content": content}])

    def default_head(self) -> list[int]:
        """What the template itself puts in front of a first user message; may be empty."""
        user = [{"role": "user", "content": _PROBE}]
        whole = self.render(user).token_ids
        turn = self.render_continuation(user, add_generation_prompt=False).token_ids
        if whole[-len(turn) :] != turn:
            raise UserError("this chat template writes the first user turn differently when there is a system message")
        return whole[: -len(turn)]

    def _find_end_of_turn(self) -> int:
        """The control token that directly follows an assistant's content, else EOS."""
        turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        rendered = self.render(turns)
        closing = rendered.token_ids[rendered.spans[-1][1] :]
        if closing and closing[0] in self._tokenizer.control_tokens.values():
            return closing[0]
        if self._tokenizer.eos_id is None:
            raise UserError("the chat template closes no turn with a control token and the model names no EOS token")
        return self._tokenizer.eos_id

    def _mark(
        self, messages: Sequence[Message], add_generation_prompt: bool, markers: str | None = None
    ) -> tuple[str, str]:
        """The rendered text with every content between two markers, and the two markers."""
        messages = [self._checked(message) for message in messages]
        contents = [message["content"] for message in messages]
        markers = markers or _unused_characters("".join([self.source, *contents]))
        plain = self._run(messages, add_generation_prompt)
        # Second try: a template that trims contents would trim nothing between markers.
        for kept in (contents, [content.strip() for content in contents]):
            wrapped = [{**m, "content": markers[0] + text + markers[1]} for m, text in zip(messages, kept)]
            marked = self._run(wrapped, add_generation_prompt)
            found = re.findall(_content_pattern(markers), marked)
            if found == kept and _without(markers, marked) == plain:
                return marked, markers
        raise UserError(
            "this chat template drops, reorders or rewrites message contents, so their tokens cannot be told apart; "
            f"the {len(messages)} messages have the roles {', '.join(m['role'] for m in messages) or 'none'}"
        )

    def _checked(self, message: Message) -> dict[str, str]:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"a message needs the strings 'role' and 'content', got role {role!r} and content {content!r:.80}"
            )
        # The template writes roles as its own text, where control tokens count.
        if not re.fullmatch(r"[\w-]+", role):
            raise UserError(f"{role!r} is no role; use system, user or assistant")
        return {"role": role, "content": content}

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._template(messages=messages, add_generation_prompt=add_generation_prompt, **self._variables)

    def _encode(self, marked_text: tuple[str, str], num_messages: int) -> Rendered:
        """Encodes marked text: control tokens from the template's parts, everything else jointly."""
        marked, markers = marked_text
        control = self._tokenizer.control_tokens
        names = "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)"
        pieces = re.compile(f"{_content_pattern(markers)}|(?P<control>{names})")
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        text, contents, position = "", [], 0  # since the last control token

        def flush() -> None:
            new_ids, offsets = self._tokenizer.encode_with_offsets(text)
            spans.extend(_token_span(offsets, *content, shift=len(ids)) for content in contents)
            ids.extend(new_ids)

        for match in pieces.finditer(marked):
            text += marked[position : match.start()]
            position = match.end()
            if match["control"] is not None:
                flush()
                ids.append(control[match["control"]])
                text, contents = "", []
            else:
                contents.append((len(text), len(text) + len(match["content"])))
                text += match["content"]
        text += marked[position:]
        flush()
        if len(spans) != num_messages:
            raise UserError("this chat template writes a system message inside another turn; use another model")
        return Rendered(ids, spans)


def _token_span(offsets: list[tuple[int, int]], start: int, end: int, *, shift: int) -> tuple[int, int]:
    """The range of tokens that cover any of the characters [start, end), moved by `shift`."""
    stop = bisect_left(offsets, end, key=lambda offset: offset[0])
    first = bisect_right(offsets, start, key=lambda offset: offset[1]) if start < end else stop
    return shift + first, shift + stop


def _content_pattern(markers: str) -> str:
    opening, closing = markers
    return f"{opening}(?P<content>[^{opening}{closing}]*){closing}"


def _without(markers: str, text: str) -> str:
    return text.translate(dict.fromkeys(map(ord, markers)))


def _unused_characters(text: str) -> str:
    """Two characters that do not occur in `text`: from Unicode's private planes, where 131,072 wait."""
    used = set(text)
    return "".join(islice((c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used), 2))
