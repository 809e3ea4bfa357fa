"""Conversations as training examples: token ids, and the teacher's distribution at each target."""

from __future__ import annotations

import dataclasses

import numpy as np

from cartridges_jax.data.schema import Conversation, Message, TeacherEntries, TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.text.chat import ChatTemplate

TARGETS = ("assistant", "all")


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation, rendered to follow a prefix, with its M targets.

    The teacher's distributions are read each time they are asked for: they are nearly all of
    the data, and of a job's hosts each reads those that its devices train on.

    Attributes:
      tokens: [T] int32.
      rows: [M] int32, position of the predicted token minus 1.
      tops: the teacher's distributions, M together.
    """

    tokens: np.ndarray
    rows: np.ndarray
    tops: tuple[TeacherEntries, ...]

    @staticmethod
    def of(tokens: np.ndarray, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> Example:
        """Builds an example whose targets are in memory.

        Args:
          tokens: [T] int32.
          rows: [M] int32.
          ids: [M, k] int32.
          logprobs: [M, k] float32.
        """
        return Example(tokens, rows, (TopLogprobs.from_dense(ids, logprobs),))

    @property
    def num_entries(self) -> int:
        """k, of the widest target."""
        return max(top.shape[1] for top in self.tops)

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's most likely tokens [M, k] int32 and their log-probabilities [M, k] float32, -inf padded.

        Raises:
          UserError: the shard that stores them is gone or damaged.
        """
        ids = np.zeros((len(self.rows), self.num_entries), np.int32)
        logprobs = np.full(ids.shape, -np.inf, np.float32)
        first = 0
        for top in self.tops:
            num_targets, k = top.shape
            ids[first : first + num_targets, :k], logprobs[first : first + num_targets, :k] = top.dense()
            first += num_targets
        return ids, logprobs

    @property
    def ids(self) -> np.ndarray:
        """The first of `targets`."""
        return self.targets()[0]

    @property
    def logprobs(self) -> np.ndarray:
        """The second of `targets`."""
        return self.targets()[1]


def render_examples(conversation: Conversation, chat: ChatTemplate, *, targets: str = "assistant") -> list[Example]:
    """Renders a conversation as it follows a prefix: without BOS and system prompt.

    It is one example as long as the template writes earlier answers as they were generated. Where it leaves out their
    thinking, what was generated is not what later turns see; a new example with the template's own rendering begins
    there, so that every target is trained in the context that serving gives it.

    Args:
      conversation: messages of user and assistant, in turn.
      chat: the template of the student.
      targets: "assistant" trains on B's tokens; "all" also on A's, wherever the
        conversation stores the teacher's log-probabilities for them and the text encodes
        to the tokens they belong to.

    Raises:
      UserError: unknown `targets`, or a conversation without any log-probabilities.
    """
    if targets not in TARGETS:
        raise UserError(f"targets {targets!r}: choose 'assistant' or 'all'")
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    examples: list[Example] = []
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    tops: list[TeacherEntries] = []

    def add_targets(message: Message, start: int) -> None:
        # A first token without a header before it is predicted from the prefix, which has no hidden state here.
        if message.top_logprobs is not None and start > 0:
            rows.append(start - 1 + np.arange(message.top_logprobs.shape[0], dtype=np.int32))
            tops.append(message.top_logprobs)

    def finish() -> None:
        if rows:
            examples.append(Example(np.asarray(tokens, np.int32), np.concatenate(rows), tuple(tops)))

    for number in range(0, len(messages), 2):
        user, assistant = conversation.messages[number : number + 2]
        prompt = chat.render_continuation(messages[: number + 1], add_generation_prompt=True)
        # Of the rendering so far, what follows the last answer. The answer's own tokens stay
        # as they were generated and are never encoded again.
        begin = prompt.spans[number - 1][1] if number else 0
        if number and not chat.same_text(tokens, prompt.token_ids[:begin]):
            finish()
            tokens, rows, tops, begin = [], [], [], 0
        elif number and tokens[-1] == prompt.token_ids[begin] == chat.end_of_turn_id:
            begin += 1
        start = prompt.spans[number][0]
        if targets == "all" and prompt.token_ids[start : start + len(user.token_ids)] == list(user.token_ids):
            add_targets(user, len(tokens) + start - begin)
        tokens += prompt.token_ids[begin:]
        add_targets(assistant, len(tokens))
        tokens += assistant.token_ids
    finish()
    if not examples:
        raise UserError(f"conversation {conversation.metadata.get('id')} has no teacher log-probabilities")
    return examples
