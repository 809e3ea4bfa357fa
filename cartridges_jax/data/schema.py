"""The schema of self-study conversations: that of the reference's published datasets (HazyResearch/cartridges)."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class TopLogprobs:
    """The teacher's most likely tokens, sparse: n entries over the T tokens of a message.

    Attributes:
      token_idx: [n] int32, which of the message's own tokens an entry belongs to.
      token_id: [n] int32, the vocabulary entry.
      logprobs: [n] float32, its log-probability (temperature 1, whole vocabulary).
      shape: (T, k).
    """

    token_idx: np.ndarray
    token_id: np.ndarray
    logprobs: np.ndarray
    shape: tuple[int, int]

    @staticmethod
    def from_dense(ids: np.ndarray, logprobs: np.ndarray) -> TopLogprobs:
        """Builds the sparse form of token ids and log-probabilities, each [T, k]."""
        num_tokens, k = ids.shape
        return TopLogprobs(
            token_idx=np.repeat(np.arange(num_tokens, dtype=np.int32), k),
            token_id=ids.astype(np.int32).reshape(-1),
            logprobs=logprobs.astype(np.float32).reshape(-1),
            shape=(num_tokens, k),
        )

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T, k] int32 and log-probabilities [T, k] float32; -inf where a token has fewer entries."""
        num_tokens, k = self.shape
        ids = np.zeros((num_tokens, k), np.int32)
        logprobs = np.full((num_tokens, k), -np.inf, np.float32)
        order = np.argsort(self.token_idx, kind="stable")
        row = self.token_idx[order]
        column = np.arange(len(row)) - np.searchsorted(row, row)
        ids[row, column] = self.token_id[order]
        logprobs[row, column] = self.logprobs[order]
        return ids, logprobs

    def read(self) -> TopLogprobs:
        """Returns itself: its entries are in memory."""
        return self


class TeacherEntries(Protocol):
    """The teacher's distributions over a message's tokens, in memory or in a file.

    Attributes:
      shape: (T, k): the message's tokens, and entries of the widest.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def read(self) -> TopLogprobs:
        """Returns the entries, read from the file if they are stored in one."""
        ...

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `TopLogprobs.dense` does."""
        ...


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
      role: "user" (A) or "assistant" (B).
      content: the text.
      token_ids: as generated (the end of turn included), or as rendered.
      top_logprobs: the teacher's distributions over these tokens; None if it has none.
    """

    role: str
    content: str
    token_ids: list[int]
    top_logprobs: TeacherEntries | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One self-study conversation.

    Attributes:
      messages: of user and assistant, in turn; without the system message.
      system_prompt: the text that the teacher had as its system message (may be empty: see chunk_span).
      metadata: id, document, chunk_span, teacher, stop_reason, seed, seed_prompt,
        seed_prompt_type, and what the writer adds.
      type: the kind of conversation, e.g. "self_study".
    """

    messages: list[Message]
    metadata: dict[str, Any]
    system_prompt: str = ""
    type: str = "self_study"
