"""Train batches from examples: rows of fixed length, several conversations in a row.

The order is a pure function of (examples, settings, seed): a resumed run finds its data
position from the step number alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cartridges_jax.data.bounded_cache import BoundedCache
from cartridges_jax.data.examples import Example
from cartridges_jax.errors import UserError

# The number of waiting conversations among which a row looks for those that fill it. Since every
# row takes the first, none waits for more rows than that.
_LOOKAHEAD = 64
# Runs whose fullest steps differ by less share a compiled program; padding passes through the LM head.
_TARGETS_STEP = 32
# Targets that stay in memory, in bytes: all of a small run's, and a bounded part of a large one's.
_TARGETS_BYTES = 64 * 2**20
# Key of the stream of shuffles among the streams of a seed.
_SHUFFLES = 2

# A target's token ids [M, k] and log-probabilities [M, k].
_Targets = tuple[np.ndarray, np.ndarray]


def _target_cache() -> BoundedCache[_Targets]:
    return BoundedCache(_TARGETS_BYTES, lambda targets: sum(part.nbytes for part in targets))


class TrainBatch(NamedTuple):
    """One optimizer step's data: A micro-batches of B rows of T tokens.

    The arrays are NumPy's on the host and JAX's on devices. The same tuple also holds their
    shapes, dtypes, logical axes or shardings.

    Attributes:
      tokens, positions, segment_ids: [A, B, T] int32; positions count from 0 within a
        segment (the model adds the prefix's); segment 0 is padding.
      rows: [A, M] int32, index into the B*T flattened tokens of a micro-batch. On a mesh
    X
      ids: [A, M, k] int32; logprobs: [A, M, k] float32, -inf padded.
      weight: [A, M] float32, 1 for a target, 0 for padding.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    rows: Any
    ids: Any
    logprobs: Any
    weight: Any


# Logical axis names of the arrays (see `parallel.rules`).
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
    """Shapes of a batch's arrays from A, B, T, M and k."""
    tokens, targets = (micro_batches, num_rows, row_tokens), (micro_batches, num_targets)
    return TrainBatch(tokens, tokens, tokens, targets, (*targets, k), (*targets, k), targets)


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """The place of every example in every step of a run.

    Attributes:
      examples: the examples that are packed.
      steps: per step, per row (A*B of them), the indices of the examples in it.
      micro_batches: A.
      row_tokens: T.
      row_parts: number of equal parts, in order, into which a mesh splits a micro-batch's rows.
      num_targets: M / row_parts, target rows of the fullest part, rounded up.
      efficiency: real tokens over all tokens.
      epochs: how often an example is seen, on average.
      target_cache: the targets that were used last, by example.
    """

    examples: Sequence[Example]
    steps: list[list[list[int]]]
    micro_batches: int
    row_tokens: int
    row_parts: int
    num_targets: int
    efficiency: float
    epochs: float
    target_cache: BoundedCache[_Targets] = dataclasses.field(default_factory=_target_cache, repr=False, compare=False)

    @functools.cached_property
    def shapes(self) -> TrainBatch:
        """Shapes of a step's batch."""
        per_micro, k = len(self.steps[0]) // self.micro_batches, max(example.num_entries for example in self.examples)
        return batch_shapes(self.micro_batches, per_micro, self.row_tokens, self.row_parts * self.num_targets, k)

    def batch(self, step: int) -> TrainBatch:
        """Builds the batch of one step."""
        parts = [self.part(step, number) for number in range(self.row_parts)]
        return TrainBatch(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts))) if len(parts) > 1 else parts[0]

    def part(self, step: int, number: int) -> TrainBatch:
        """Builds one mesh part of a step's batch: its share of the rows of every micro-batch."""
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
                    own_ids, own_logprobs = self.target_cache.get(index, example.targets)
                    ids[a, where, : own_ids.shape[1]] = own_ids
                    logprobs[a, where, : own_ids.shape[1]] = own_logprobs
                    weight[a, where] = 1.0
                    filled += len(example.rows)
                    at += size
        return TrainBatch(tokens, positions, segment_ids, target_rows, ids, logprobs, weight)


def _endless_order(num_examples: int, seed: int) -> Iterator[int]:
    """Indices of the examples, epoch after epoch, each shuffled by a stream of its own."""
    for epoch in itertools.count():
        # A spawn key, because [seed, tag] and [seed, tag, 0] are the same entropy to NumPy.
        stream = np.random.SeedSequence(seed, spawn_key=(_SHUFFLES, epoch))
        yield from np.random.default_rng(stream).permutation(num_examples).tolist()


def _fullest_row(sizes: Sequence[int], row_tokens: int) -> list[int]:
    """The first item, and the subset of the others that leaves the least of a row empty.

    Subset sum by dynamic programming: bit c of `sums[n]` says that some of the first n
    items that fit have c tokens together. Of equally full subsets, the one that is complete
    earliest in the queue is taken.

    Args:
      sizes: in tokens; one at least, none above `row_tokens`.
      row_tokens: T.

    Returns:
      Ascending indices into `sizes`.
    """
    room = row_tokens - sizes[0]
    within = (1 << (room + 1)) - 1
    fitting = [item for item in range(1, len(sizes)) if sizes[item] <= room]
    sums = [1]
    for item in fitting:
        sums.append((sums[-1] | sums[-1] << sizes[item]) & within)
        if sums[-1] >> room:
            break
    filled = sums[-1].bit_length() - 1
    members = []
    for n in range(len(sums) - 1, 0, -1):
        if not sums[n - 1] >> filled & 1:
            members.append(fitting[n - 1])
            filled -= sizes[fitting[n - 1]]
    return [0, *reversed(members)]


def packed_rows(sizes: Sequence[int], row_tokens: int, order: Iterable[int] | None = None) -> Iterator[list[int]]:
    """Packs items into rows of `row_tokens` tokens until all are placed.

    Each row takes the first item of the queue, and of the next ones those that fill the rest
    of the row best (see `_fullest_row`).

    Args:
      sizes: of the items, in tokens; none above `row_tokens`.
      order: indices in the order in which they queue up; may be endless. By default
        every item once.

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
    """Number of target rows that a step is compiled for, from that of its fullest part."""
    return -(-fullest // _TARGETS_STEP) * _TARGETS_STEP


def check_rows(rows_per_step: int, micro_batches: int, row_parts: int) -> None:
    """Raises UserError where a step's rows do not divide into micro-batches, or a micro-batch's rows into a mesh's parts."""
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
      examples: at least one, each of at most `row_tokens` tokens.
      num_steps: number of steps; None takes every example once, in the order given.
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
    sizes = [len(example.tokens) for example in examples]
    if max(sizes) > row_tokens:
        raise UserError(
            f"a conversation of {max(sizes)} tokens does not fit a row of {row_tokens}: raise train.row_tokens"
        )
    check_rows(rows_per_step, micro_batches, row_parts)
    order = None if num_steps is None else _endless_order(len(examples), seed)
    rows = packed_rows(sizes, row_tokens, order)
    if num_steps is None:
        packed = list(rows)
        packed += [[]] * (-len(packed) % rows_per_step)
    else:
        packed = list(itertools.islice(rows, num_steps * rows_per_step))
    placed = np.fromiter(itertools.chain.from_iterable(packed), np.int64)
    num_targets = [len(example.rows) for example in examples]
    per_row = np.array([sum(num_targets[index] for index in row) for row in packed])
    per_part = per_row.reshape(-1, rows_per_step // micro_batches // row_parts).sum(axis=1)
    return PackingPlan(
        examples=examples,
        steps=[packed[first : first + rows_per_step] for first in range(0, len(packed), rows_per_step)],
        micro_batches=micro_batches,
        row_tokens=row_tokens,
        row_parts=row_parts,
        num_targets=rounded_targets(int(per_part.max())),
        efficiency=float(np.asarray(sizes)[placed].sum() / (len(packed) * row_tokens)),
        epochs=len(placed) / len(examples),
    )
