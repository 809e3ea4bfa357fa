"""Conversations to train batches: rows of fixed length, several conversations a row.

The order is a pure function of (examples, settings, seed): a resumed run finds its place
from the step number alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import grain.python as grain
import numpy as np

from cartridges_jax.data.conversations import Conversation, Message, StoredTopLogprobs, TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.text.chat import ChatTemplate

# Among how many waiting conversations a row looks for those that fill it; since every row
# takes the first, none waits for more rows than that.
_LOOKAHEAD = 64
# Runs whose fullest steps differ by less share a compiled program; padding passes through the LM head.
_TARGETS_STEP = 32


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation, rendered to stand behind a prefix, with its targets.

    The targets are read when a batch is first made of them, and kept from then on: of a
    job's hosts each reads and holds those that its devices train on.

    Attributes:
      tokens: [T] int32.
      rows: [M] int32, position of the predicted token minus 1.
      tops: the teacher's distributions, M together.
    """

    tokens: np.ndarray
    rows: np.ndarray
    tops: tuple[TopLogprobs | StoredTopLogprobs, ...]

    @staticmethod
    def of(tokens: np.ndarray, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> Example:
        """From targets at hand: ids and log-probabilities, each [M, k]."""
        return Example(tokens, rows, (TopLogprobs.from_dense(ids, logprobs),))

    @property
    def num_entries(self) -> int:
        """k, of the widest target."""
        return max(top.shape[1] for top in self.tops)

    @functools.cached_property
    def _targets(self) -> tuple[np.ndarray, np.ndarray]:
        ids, logprobs = zip(*(top.dense() for top in self.tops), strict=True)
        k = self.num_entries
        return (
            np.concatenate([_widened(part, k, 0) for part in ids]),
            np.concatenate([_widened(part, k, -np.inf) for part in logprobs]),
        )

    @property
    def ids(self) -> np.ndarray:
        """[M, k] int32, the teacher's most likely tokens."""
        return self._targets[0]

    @property
    def logprobs(self) -> np.ndarray:
        """[M, k] float32, -inf padded."""
        return self._targets[1]


def render_example(conversation: Conversation, chat: ChatTemplate, *, targets: str = "assistant") -> Example:
    """Renders a conversation behind a prefix.

    Args:
      targets: "assistant" trains on B's tokens; "all" also on A's, wherever
        the conversation stores the teacher's log-probabilities for them (and the text
        encodes to the tokens they belong to).

    Raises:
      UserError: unknown `targets`, or a conversation without any log-probabilities.
    """
    if targets not in ("assistant", "all"):
        raise UserError(f"targets {targets!r}: choose 'assistant' or 'all'")
    turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    tops: list[TopLogprobs | StoredTopLogprobs] = []

    def add_targets(message: Message, start: int) -> None:
        if message.top_logprobs is not None:
            rows.append(start - 1 + np.arange(message.top_logprobs.shape[0], dtype=np.int32))
            tops.append(message.top_logprobs)

    for number in range(0, len(turns), 2):
        user, assistant = conversation.messages[number : number + 2]
        prompt = chat.render_continuation(turns[: number + 1], add_generation_prompt=True)
        # Of the rendering so far, what comes behind the last answer; the answer's own
        # tokens are kept as they were generated, never encoded again.
        begin = prompt.spans[number - 1][1] if number else 0
        if number and tokens[-1] == prompt.token_ids[begin] == chat.end_of_turn_id:
            begin += 1
        start = prompt.spans[number][0]
        if targets == "all" and prompt.token_ids[start : start + len(user.token_ids)] == list(user.token_ids):
            add_targets(user, len(tokens) + start - begin)
        tokens += prompt.token_ids[begin:]
        add_targets(assistant, len(tokens))
        tokens += assistant.token_ids
    if not rows:
        raise UserError(f"conversation {conversation.metadata.get('id')} has no teacher log-probabilities")
    return Example(np.asarray(tokens, np.int32), np.concatenate(rows), tuple(tops))


def _widened(array: np.ndarray, k: int, fill: float) -> np.ndarray:
    """[M, k'] to [M, k]."""
    return np.pad(array, [(0, 0), (0, k - array.shape[1])], constant_values=fill)


class TrainBatch(NamedTuple):
    """One optimizer step's data: A micro-batches of B rows of T tokens.

    Attributes:
      tokens, positions, segment_ids: [A, B, T] int32; positions count from 0 within a
        segment (the model adds the prefix's); segment 0 is padding.
      rows: [A, M] int32, index into the B*T flattened tokens of a micro-batch. On a mesh
        that splits the B rows into parts, the targets of each part lie together.
      ids: [A, M, k] int32; logprobs: [A, M, k] float32, -inf padded.
      weight: [A, M] float32, 1 for a target, 0 for padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    rows: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    weight: np.ndarray


# Logical names of the arrays' axes (see `parallel.rules`).
BATCH_AXES = TrainBatch(
    tokens=(None, "rows", None),
    positions=(None, "rows", None),
    segment_ids=(None, "rows", None),
    rows=(None, "rows"),
    ids=(None, "rows", None),
    logprobs=(None, "rows", None),
    weight=(None, "rows"),
)


BATCH_DTYPES = TrainBatch(np.int32, np.int32, np.int32, np.int32, np.int32, np.float32, np.float32)


def batch_shapes(micro_batches: int, num_rows: int, row_tokens: int, num_targets: int, k: int) -> TrainBatch:
    """A, B, T, M and k to the shapes of a batch's arrays."""
    tokens, targets = (micro_batches, num_rows, row_tokens), (micro_batches, num_targets)
    return TrainBatch(tokens, tokens, tokens, targets, (*targets, k), (*targets, k), targets)


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Which example goes where, for every step of a run.

    Attributes:
      examples: what is packed.
      steps: per step, per row (A*B of them), the indices of the examples in it.
      micro_batches: A.
      row_tokens: T.
      row_parts: into how many equal parts, in order, a mesh splits a micro-batch's rows.
      num_targets: M / row_parts, target rows of the fullest part, rounded up.
      efficiency: real tokens over all tokens.
      epochs: how often an example is seen, on average.
    """

    examples: Sequence[Example]
    steps: list[list[list[int]]]
    micro_batches: int
    row_tokens: int
    row_parts: int
    num_targets: int
    efficiency: float
    epochs: float

    @functools.cached_property
    def shapes(self) -> TrainBatch:
        """Of a step's batch."""
        per_micro, k = len(self.steps[0]) // self.micro_batches, max(example.num_entries for example in self.examples)
        return batch_shapes(self.micro_batches, per_micro, self.row_tokens, self.row_parts * self.num_targets, k)

    def batch(self, step: int) -> TrainBatch:
        """The batch of one step."""
        parts = [self.part(step, number) for number in range(self.row_parts)]
        return TrainBatch(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts))) if len(parts) > 1 else parts[0]

    def part(self, step: int, number: int) -> TrainBatch:
        """What one part of the mesh has of a step's batch: the rows numbered so within every micro-batch."""
        rows = self.steps[step]
        micro, per_micro = self.micro_batches, len(rows) // self.micro_batches
        per_part = per_micro // self.row_parts
        first = number * per_part
        k = self.shapes.ids[-1]
        tokens, positions, segment_ids = (np.zeros((micro, per_part, self.row_tokens), np.int32) for _ in range(3))
        # Padding points at the first token of its part.
        target_rows = np.full((micro, self.num_targets), first * self.row_tokens, np.int32)
        ids = np.zeros((micro, self.num_targets, k), np.int32)
        logprobs = np.full((micro, self.num_targets, k), -np.inf, np.float32)
        weight = np.zeros((micro, self.num_targets), np.float32)
        for a in range(micro):
            filled = 0
            for b in range(per_part):
                at = 0
                for segment, index in enumerate(rows[a * per_micro + first + b], start=1):
                    example = self.examples[index]
                    size = len(example.tokens)
                    tokens[a, b, at : at + size] = example.tokens
                    positions[a, b, at : at + size] = np.arange(size)
                    segment_ids[a, b, at : at + size] = segment
                    where = slice(filled, filled + len(example.rows))
                    target_rows[a, where] = (first + b) * self.row_tokens + at + example.rows
                    ids[a, where] = _widened(example.ids, k, 0)
                    logprobs[a, where] = _widened(example.logprobs, k, -np.inf)
                    weight[a, where] = 1.0
                    filled += len(example.rows)
                    at += size
        return TrainBatch(tokens, positions, segment_ids, target_rows, ids, logprobs, weight)


def _endless_order(num_examples: int, seed: int) -> Iterator[int]:
    order = grain.MapDataset.range(num_examples).shuffle(seed=seed).repeat()
    position = 0
    while True:
        yield int(order[position])
        position += 1


def _fullest_row(sizes: Sequence[int], row_tokens: int) -> list[int]:
    """The first item, and the subset of the others that leaves the least of a row empty.

    Subset sum by dynamic programming: bit c of `sums[n]` says that some of the first n
    items have c tokens together. Of equally full subsets, the one that is complete
    earliest in the queue is taken.

    Args:
      sizes: in tokens; one at least, none above `row_tokens`.

    Returns:
      Ascending indices into `sizes`.
    """
    within = (1 << (row_tokens + 1)) - 1
    sums = [1 << sizes[0]]
    for size in sizes[1:]:
        sums.append((sums[-1] | sums[-1] << size) & within)
        if sums[-1] >> row_tokens:
            break
    left = sums[-1].bit_length() - 1
    members = []
    for item in range(len(sums) - 1, 0, -1):
        if not sums[item - 1] >> left & 1:
            members.append(item)
            left -= sizes[item]
    return [0, *reversed(members)]


def packed_rows(sizes: Sequence[int], row_tokens: int, order: Iterable[int] | None = None) -> Iterator[list[int]]:
    """Packs items into rows of `row_tokens` until all are placed.

    Row by row: the first item of the queue, and of those behind it the ones that fill the
    rest of the row best (see `_fullest_row`).

    Args:
      sizes: of the items, in tokens; none above `row_tokens`.
      order: indices in the order in which they queue up, perhaps without end; by
        default every item once.

    Yields:
      The indices of a row's items.
    """
    order = iter(range(len(sizes)) if order is None else order)
    queue: list[int] = []
    while True:
        queue += itertools.islice(order, _LOOKAHEAD - len(queue))
        if not queue:
            return
        members = _fullest_row([sizes[index] for index in queue], row_tokens)
        yield [queue[at] for at in members]
        for at in reversed(members):
            queue.pop(at)


def rounded_targets(fullest: int) -> int:
    """Target rows that a step is compiled for, from those of its fullest part."""
    return -(-fullest // _TARGETS_STEP) * _TARGETS_STEP


def check_rows(rows_per_step: int, micro_batches: int, row_parts: int) -> None:
    """Raises UserError where a step's rows do not divide into micro-batches, or theirs into a mesh's parts."""
    if rows_per_step % micro_batches:
        raise UserError(f"train.rows_per_step={rows_per_step} is not divisible by train.micro_batches={micro_batches}")
    if rows_per_step // micro_batches % row_parts:
        raise UserError(
            f"the {rows_per_step // micro_batches} rows of a micro-batch cannot be split into the {row_parts} parts that "
            "the mesh's data and fsdp axes make: change train.rows_per_step, train.micro_batches or the mesh"
        )


def plan_packing(
    examples: Sequence[Example],
    *,
    num_steps: int | None,
    rows_per_step: int,
    row_tokens: int,
    micro_batches: int,
    row_parts: int = 1,
    seed: int = 0,
) -> PackingPlan:
    """Assigns examples to the rows of every step, epoch after epoch, each shuffled.

    Args:
      num_steps: how many; None takes every example once, in the order given.
      rows_per_step: A * B.
      row_tokens: T.
      micro_batches: A.
      row_parts: see `PackingPlan`; the rows do not depend on it.
      seed: of the shuffles.

    Raises:
      UserError: no examples, one longer than a row, or rows that the micro-batches, or
        a micro-batch's rows that the parts, do not divide.
    """
    if not examples:
        raise UserError("there are no conversations to train on: raise study.conversations")
    longest = max(len(example.tokens) for example in examples)
    if longest > row_tokens:
        raise UserError(
            f"a conversation of {longest} tokens does not fit a row of {row_tokens}: raise train.row_tokens"
        )
    check_rows(rows_per_step, micro_batches, row_parts)
    order = None if num_steps is None else _endless_order(len(examples), seed)
    packed = packed_rows([len(example.tokens) for example in examples], row_tokens, order)
    steps, used, placed = [], 0, 0
    fullest = 0
    while len(steps) < num_steps if num_steps is not None else placed < len(examples):
        rows = [next(packed, []) for _ in range(rows_per_step)]
        members = [index for row in rows for index in row]
        placed += len(members)
        used += sum(len(examples[index].tokens) for index in members)
        per_part = rows_per_step // micro_batches // row_parts
        for first in range(0, rows_per_step, per_part):
            members = [index for row in rows[first : first + per_part] for index in row]
            fullest = max(fullest, sum(len(examples[index].rows) for index in members))
        steps.append(rows)
    return PackingPlan(
        examples=examples,
        steps=steps,
        micro_batches=micro_batches,
        row_tokens=row_tokens,
        row_parts=row_parts,
        num_targets=rounded_targets(fullest),
        efficiency=used / (len(steps) * rows_per_step * row_tokens),
        epochs=placed / len(examples),
    )
