"""The slots behind one prefix: rows that decode, and prompts that are read on their way there.

Rows of one decode batch share their prefix, so an engine holds a group per prefix in use:

    waiting ──reading──▶ admitted to free rows ──decode──▶ collected, row free again
     (queue)  (own cache,                        (up to num_steps
               chunks)                            a dispatch)

A group knows what has ended only when outputs are collected, which may be a dispatch
late; the device itself never runs a row beyond its end.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cartridges_jax import parallel
from cartridges_jax.models import Cache, Model, empty_cache
from cartridges_jax.sampling import programs
from cartridges_jax.sampling.buckets import (
    READ_CHUNK,
    power_of_two,
    prompt_bucket,
    read_rows,
    row_bucket,
    slot_bucket,
    smaller_bucket,
    top_bucket,
)
from cartridges_jax.sampling.request import Live
from cartridges_jax.sampling.select import GREEDY, Choice, RowSampling

# Slots kept free for an answer when its row is made, so that short answers never make the cache grow.
_ROOM = 64


@dataclasses.dataclass(frozen=True)
class Pending:
    """Outputs of a dispatch that nobody has looked at.

    Attributes:
      rows: (column of the outputs, request, steps that it was promised).
      outputs: as `programs.decode` returns them, perhaps still being computed.
    """

    rows: list[tuple[int, Live, int]]
    outputs: programs.Outputs


@dataclasses.dataclass
class _Reading:
    """Prompts that are read together: R rows of W slots, `begin` tokens of each done."""

    mates: list[Live]
    tokens: np.ndarray
    segment_ids: np.ndarray
    cache: Cache
    last: Any
    begin: int = 0


class Group:
    """See the module."""

    def __init__(
        self, model: Model, front: programs.Front | None, *, num_steps: int, max_slots: int, tokens_per_read: int
    ):
        self._model = model
        self._front = front
        self._num_steps = num_steps
        self._max_slots = max_slots
        self._tokens_per_read = tokens_per_read
        self._waiting: collections.deque[Live] = collections.deque()
        self._reading: _Reading | None = None
        self._occupants: list[Live | None] = []
        self._state: programs.State | None = None
        self._rows: programs.Rows | None = None
        self._just_decoded = True

    @property
    def num_held(self) -> int:
        """Requests that have a slot or were promised one."""
        return self._num_running + self._num_coming

    @property
    def _num_running(self) -> int:
        return sum(live is not None for live in self._occupants)

    @property
    def _num_coming(self) -> int:
        return len(self._waiting) + (0 if self._reading is None else sum(not live.over for live in self._reading.mates))

    def add(self, live: Live) -> None:
        self._waiting.append(live)

    def release(self, live: Live) -> None:
        """Frees the slot of a request that is over, wherever it is."""
        if live in self._waiting:
            self._waiting.remove(live)
        if live in self._occupants:
            self._occupants[self._occupants.index(live)] = None
            self._rows = None

    def dispatch(self, more: bool) -> Pending | None:
        """Starts the group's next program.

        Args:
          more: requests wait for slots, so a dispatch ends early when rows do.
        """
        if self._reading is None and self._waiting:
            self._reading = self._begin_reading()
        # Fill the rows first; running rows get every other dispatch, and all once they are the many.
        if self._reading is not None and (
            self._just_decoded or not self._num_running or self._num_coming >= self._num_running
        ):
            self._just_decoded = False
            return self._read()
        self._just_decoded = True
        return self._decode(more) if self._num_running else None

    # Reading

    def _begin_reading(self) -> _Reading:
        """Takes prompts of one size off the queue, the first of it and those like it."""
        width = prompt_bucket(len(self._waiting[0].request.prompt))
        chunk = min(width, READ_CHUNK)
        most = read_rows(max(1, self._tokens_per_read // chunk))
        mates = [live for live in self._waiting if prompt_bucket(len(live.request.prompt)) == width][:most]
        num_rows = read_rows(len(mates))
        mates = mates[:num_rows]
        # What is left of the rows is filled with shorter prompts.
        taken = set(map(id, mates))
        shorter = (live for live in self._waiting if id(live) not in taken and len(live.request.prompt) <= width)
        mates += [live for _, live in zip(range(num_rows - len(mates)), shorter)]
        taken = set(map(id, mates))
        self._waiting = collections.deque(live for live in self._waiting if id(live) not in taken)

        tokens = np.zeros((num_rows, width), np.int32)
        lengths = np.zeros((num_rows,), np.int32)
        for row in range(num_rows):
            # Rows that nobody needs repeat the first.
            prompt = mates[row if row < len(mates) else 0].request.prompt
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        model = self._model
        return _Reading(
            mates=mates,
            tokens=tokens,
            segment_ids=(np.arange(width) < lengths[:, None]).astype(np.int32),
            cache=empty_cache(model.config, num_rows, slot_bucket(width), model.dtype, mesh=model.mesh),
            last=parallel.zeros(model.mesh, ("rows", None), (num_rows, model.config.d_model), model.dtype),
        )

    def _read(self) -> Pending | None:
        """One chunk; after the last one, the rows join those that decode."""
        reading, model = self._reading, self._model
        if all(live.over for live in reading.mates):
            self._reading = None
            return None
        window = slice(reading.begin, reading.begin + READ_CHUNK)
        reading.cache, reading.last = programs.read_chunk(
            model.config,
            model.params,
            self._front,
            reading.cache,
            reading.last,
            reading.tokens[:, window],
            reading.segment_ids[:, window],
        )
        reading.begin += READ_CHUNK
        if reading.begin < reading.tokens.shape[1]:
            return None
        self._reading = None
        return self._admit(reading)

    def _admit(self, reading: _Reading) -> Pending:
        # Requests that were cancelled meanwhile take a row too, which is free again at once.
        self._make_room(reading.mates)
        free = [row for row, live in enumerate(self._occupants) if live is None]
        at = free[: len(reading.mates)]
        for row, live in zip(at, reading.mates):
            self._occupants[row] = None if live.over else live
            live.in_flight += 1
        self._rows = None
        padding = reading.tokens.shape[0] - len(at)
        running, outputs = programs.first_tokens(
            self._model.config,
            self._model.params,
            reading.last,
            rows_of(reading.mates + reading.mates[:1] * padding),
            **self._static(reading.mates),
        )
        at = np.asarray(at + at[:1] * padding, np.int32)
        self._state = programs.admit(self._state, reading.cache, outputs[0][0], running, at)
        return Pending([(column, live, 1) for column, live in enumerate(reading.mates)], outputs)

    def _make_room(self, coming: Sequence[Live]) -> None:
        """Rows for those coming and all that will follow, slots for their prompts and a short answer."""
        staying = [live for live in self._occupants if live is not None]
        num_rows = max(row_bucket(len(staying) + len(coming) + len(self._waiting)), len(self._occupants))
        need = max(live.slots_for(_ROOM) for live in (*staying, *coming))
        num_slots = 0 if self._state is None else self._state.cache.num_slots
        if num_rows > len(self._occupants) or need > num_slots:
            self._resize(num_rows, max(num_slots, self._slots(need)))

    # Decoding

    def _decode(self, more: bool) -> Pending:
        running = self._num_running
        num_rows, num_slots = len(self._occupants), self._state.cache.num_slots
        if not more and not self._num_coming and running <= smaller_bucket(num_rows):
            num_rows = row_bucket(running)
        need = max(live.slots_for(self._num_steps) for live in self._occupants if live is not None)
        if num_rows < len(self._occupants) or need > num_slots:
            self._resize(num_rows, max(num_slots, self._slots(need)))
        if more:
            # A few free rows are worth a refill.
            enough = running - max(1, running // 8)
        else:
            # Half of them empty is worth a smaller batch.
            enough = 0 if self._num_coming else smaller_bucket(num_rows)
        promised = [(row, live, self._num_steps) for row, live in enumerate(self._occupants) if live is not None]
        for _, live, steps in promised:
            live.in_flight += steps
        self._state, outputs = programs.decode(
            self._model.config,
            self._model.decode_params,
            self._front,
            self._state,
            self._settings(),
            np.int32(enough),
            num_steps=self._num_steps,
            **self._static(self._occupants),
        )
        return Pending(promised, outputs)

    def _slots(self, num_tokens: int) -> int:
        return min(slot_bucket(num_tokens), self._max_slots)

    def _resize(self, num_rows: int, num_slots: int) -> None:
        kept = [row for row, live in enumerate(self._occupants) if live is not None]
        occupants = [self._occupants[row] for row in kept]
        self._occupants = occupants + [None] * (num_rows - len(kept))
        self._rows = None
        if self._state is None or not kept:
            model = self._model
            self._state = programs.empty_state(
                model.config, num_rows, num_slots, model.dtype, unstacked=model.decodes_unstacked, mesh=model.mesh
            )
            return
        at = np.asarray(kept + kept[:1] * (num_rows - len(kept)), np.int32)
        self._state = programs.resize(self._state, at, np.arange(num_rows) < len(kept), num_slots=num_slots)

    def _static(self, lives: Sequence[Live | None]) -> dict[str, Any]:
        requests = [live.request for live in lives if live is not None]
        return {
            "choice": Choice.of(request.sampling for request in requests),
            "num_top": min(
                top_bucket(max((request.top_logprobs for request in requests), default=0)),
                self._model.config.vocab_size,
            ),
        }

    def _settings(self) -> programs.Rows:
        """The rows' settings on the device, made anew when rows have changed hands."""
        if self._rows is None:
            self._rows = parallel.replicate(rows_of(self._occupants), self._model.mesh)
        return self._rows


@functools.lru_cache(maxsize=1024)
def _key_data(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def rows_of(lives: Sequence[Live | None]) -> programs.Rows:
    """What requests ask for, as NumPy arrays; a row without one is stopped."""
    requests = [None if live is None or live.over else live.request for live in lives]
    most_stops = max((len(live.stops) for live in lives if live), default=0)
    stop_ids = np.full((len(lives), max(4, power_of_two(most_stops))), -1, np.int32)
    for row, live in enumerate(lives):
        if live is not None:
            stop_ids[row, : len(live.stops)] = sorted(live.stops)
    return programs.Rows(
        limits=np.asarray([request.max_tokens if request else 0 for request in requests], np.int32),
        stop_ids=stop_ids,
        seeds=np.stack([_key_data(request.seed if request else 0) for request in requests]),
        streams=np.asarray([request.stream if request else 0 for request in requests], np.uint32),
        sampling=RowSampling.of([request.sampling if request else GREEDY for request in requests]),
    )
