"""The requests after one prefix: prompts that are read, and rows that decode.

Rows of one decode batch share their prefix, so an engine has a group per prefix in use:

    waiting ──reading──▶ admitted to free rows ──decode──▶ collected, row free again
     (queue)  (own cache,                        (up to num_steps
               chunks)                            a dispatch)

A group learns that a row has ended when its outputs are collected, which may be a dispatch
late; the device itself never runs a row beyond its end.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Cache, Model
from cartridges_jax.sampling import decoding, reading
from cartridges_jax.sampling.buckets import (
    READ_CHUNK,
    prompt_bucket,
    read_rows,
    row_bucket,
    slot_bucket,
    smaller_bucket,
    top_bucket,
)
from cartridges_jax.sampling.request import Live
from cartridges_jax.sampling.rows import Outputs, Rows, rows_of
from cartridges_jax.sampling.select import Choice

# Slots reserved for an answer when its row is admitted, so that short answers never make the cache grow.
_ROOM = 64


@dataclasses.dataclass(frozen=True)
class Pending:
    """Outputs of a dispatch that are not collected yet.

    Attributes:
      rows: (column of the outputs, request, steps that were dispatched for it).
      outputs: as `decoding.decode` returns them, perhaps still being computed.
    """

    rows: list[tuple[int, Live, int]]
    outputs: Outputs


@dataclasses.dataclass
class _Reading:
    """Prompts that are read together: R rows of W slots, of which `begin` tokens are read.

    Attributes:
      lives: the requests of the first rows.
      last: [R, D], the hidden state of each row's last token so far.
    """

    lives: list[Live]
    tokens: np.ndarray
    segment_ids: np.ndarray
    cache: Cache
    last: Any
    begin: int = 0


class Group:
    """The queue, the prompts being read and the rows of one prefix (see the module)."""

    def __init__(self, model: Model, prefix: KVPrefix | None, *, num_steps: int, max_slots: int, tokens_per_read: int):
        self._model = model
        self._prefix = prefix
        self._num_steps = num_steps
        self._max_slots = max_slots
        self._tokens_per_read = tokens_per_read
        self._waiting: collections.deque[Live] = collections.deque()
        self._reading: _Reading | None = None
        self._occupants: list[Live | None] = []
        self._state: decoding.State | None = None
        self._rows: Rows | None = None
        self._just_decoded = True

    @property
    def num_held(self) -> int:
        """Requests that have a slot or wait for one that is theirs."""
        return self._num_running + self._num_coming

    @property
    def _num_running(self) -> int:
        return sum(live is not None for live in self._occupants)

    @property
    def _num_coming(self) -> int:
        return len(self._waiting) + (0 if self._reading is None else sum(not live.over for live in self._reading.lives))

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
        # Fill the rows first; running rows get every other dispatch, and all once they are the majority.
        if self._reading is not None and (
            self._just_decoded or not self._num_running or self._num_coming >= self._num_running
        ):
            self._just_decoded = False
            return self._read()
        self._just_decoded = True
        return self._decode(more) if self._num_running else None

    # Reading

    def _begin_reading(self) -> _Reading:
        """Takes prompts of one size off the queue: the first, and others of its size."""
        width = prompt_bucket(len(self._waiting[0].request.prompt))
        chunk = min(width, READ_CHUNK)
        most = read_rows(max(1, self._tokens_per_read // chunk))
        chosen = [live for live in self._waiting if prompt_bucket(len(live.request.prompt)) == width][:most]
        num_rows = read_rows(len(chosen))
        chosen = chosen[:num_rows]
        # The remaining rows are filled with shorter prompts.
        taken = set(map(id, chosen))
        shorter = (live for live in self._waiting if id(live) not in taken and len(live.request.prompt) <= width)
        chosen += [live for _, live in zip(range(num_rows - len(chosen)), shorter)]
        taken = set(map(id, chosen))
        self._waiting = collections.deque(live for live in self._waiting if id(live) not in taken)

        tokens = np.zeros((num_rows, width), np.int32)
        lengths = np.zeros((num_rows,), np.int32)
        for row in range(num_rows):
            # Unused rows repeat the first.
            prompt = chosen[row if row < len(chosen) else 0].request.prompt
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        model = self._model
        return _Reading(
            lives=chosen,
            tokens=tokens,
            segment_ids=(np.arange(width) < lengths[:, None]).astype(np.int32),
            cache=model.reading_cache(num_rows, slot_bucket(width)),
            last=parallel.zeros(model.mesh, ("rows", None), (num_rows, model.config.d_model), model.dtype),
        )

    def _read(self) -> Pending | None:
        """Reads one chunk; after the last one, the rows join those that decode."""
        batch, model = self._reading, self._model
        if all(live.over for live in batch.lives):
            self._reading = None
            return None
        window = slice(batch.begin, batch.begin + READ_CHUNK)
        batch.cache, batch.last = reading.read_chunk(
            model.config,
            model.params,
            self._prefix,
            batch.cache,
            batch.last,
            batch.tokens[:, window],
            batch.segment_ids[:, window],
        )
        batch.begin += READ_CHUNK
        if batch.begin < batch.tokens.shape[1]:
            return None
        self._reading = None
        return self._admit(batch)

    def _admit(self, batch: _Reading) -> Pending:
        # Requests that were cancelled meanwhile take a row too, which is free again at once.
        self._make_room(batch.lives)
        free = [row for row, live in enumerate(self._occupants) if live is None]
        at = free[: len(batch.lives)]
        for row, live in zip(at, batch.lives):
            self._occupants[row] = None if live.over else live
            live.in_flight += 1
        self._rows = None
        padding = batch.tokens.shape[0] - len(at)
        running, outputs = reading.first_tokens(
            self._model.config,
            self._model.params,
            batch.last,
            rows_of(batch.lives + batch.lives[:1] * padding),
            **self._static(batch.lives),
        )
        at = np.asarray(at + at[:1] * padding, np.int32)
        self._state = decoding.admit(self._state, batch.cache, outputs[0][0], running, at)
        return Pending([(column, live, 1) for column, live in enumerate(batch.lives)], outputs)

    def _make_room(self, coming: Sequence[Live]) -> None:
        """Ensures rows for `coming` and all that wait, and slots for their prompts and a short answer."""
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
        dispatched = [(row, live, self._num_steps) for row, live in enumerate(self._occupants) if live is not None]
        for _, live, steps in dispatched:
            live.in_flight += steps
        self._state, outputs = decoding.decode(
            self._model.config,
            self._model.decode_params,
            self._prefix,
            self._state,
            self._settings(),
            np.int32(enough),
            num_steps=self._num_steps,
            **self._static(self._occupants),
        )
        return Pending(dispatched, outputs)

    def _slots(self, num_tokens: int) -> int:
        return min(slot_bucket(num_tokens), self._max_slots)

    def _resize(self, num_rows: int, num_slots: int) -> None:
        occupied = [row for row, live in enumerate(self._occupants) if live is not None]
        occupants = [self._occupants[row] for row in occupied]
        self._occupants = occupants + [None] * (num_rows - len(occupied))
        self._rows = None
        if self._state is None or not occupied:
            self._state = decoding.empty_state(self._model.decoding_cache(num_rows, num_slots), self._model.mesh)
            return
        at = np.asarray(occupied + occupied[:1] * (num_rows - len(occupied)), np.int32)
        self._state = decoding.resize(self._state, at, np.arange(num_rows) < len(occupied), num_slots=num_slots)

    def _static(self, lives: Sequence[Live | None]) -> dict[str, Any]:
        requests = [live.request for live in lives if live is not None]
        return {
            "choice": Choice.of(request.sampling for request in requests),
            "num_top": min(
                top_bucket(max((request.top_logprobs for request in requests), default=0)),
                self._model.config.vocab_size,
            ),
        }

    def _settings(self) -> Rows:
        """The rows' settings on the device, rebuilt when rows have changed."""
        if self._rows is None:
            self._rows = parallel.replicate(rows_of(self._occupants), self._model.mesh)
        return self._rows
