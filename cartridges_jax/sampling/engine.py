"""Continuous batching: many requests, over many prefixes, through one set of slots.

    engine = Engine(model, num_slots=64)
    handle = engine.add_prefix(prefix)
    engine.submit(Request(token_ids, max_tokens=32, prefix=handle))
    while engine.busy:
        for event in engine.step(): ...

A step starts one program on the device: a chunk of new prompts, or a few decode steps of
the rows after one prefix. Slots are refilled as sequences end, so no request waits for the
longest. Which program is started depends on the requests and on the order of calls, never on the
clock: the same calls give the same tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from cartridges_jax.cartridge import KVPrefix, pad_slots
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.sampling.buckets import prefix_bucket, round_up
from cartridges_jax.sampling.group import Group, Pending
from cartridges_jax.sampling.prefill import check_token_ids
from cartridges_jax.sampling.request import Event, Generation, Live, PrefixHandle, Request

# Decode steps of a dispatch, and about how many tokens of prompts are read in one.
STEPS_PER_DISPATCH, TOKENS_PER_READ = 8, 1024


@dataclasses.dataclass
class _Resident:
    """A prefix on the device; removed once it is dropped and no request uses it."""

    prefix: KVPrefix
    users: int = 0
    dropped: bool = False


class Engine:
    """Continuous batching (see the module), for one thread at a time.

    Attributes:
      num_dispatches: programs started so far, for measurements and tests.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int = 64,
        max_tokens_per_slot: int | None = None,
        steps_per_dispatch: int = STEPS_PER_DISPATCH,
        tokens_per_read: int = TOKENS_PER_READ,
        lookahead: int | None = None,
    ):
        """
        Args:
          num_slots: requests that are read or decoded at once, over all prefixes.
          max_tokens_per_slot: prompt and answer together; the model's context by default.
            Memory is taken only as the longest request of a group needs it.
          steps_per_dispatch: decode steps between two checks for rows that have ended.
          tokens_per_read: about how many tokens of prompts are read per dispatch.
          lookahead: how many dispatches are started before the outputs of the first are
            fetched. 1 overlaps the host's work with the device's, but ended rows are seen a
            dispatch late; the default is 1 on accelerators and 0 on CPUs, where an idle row
            costs more than the host does.

        Raises:
          ValueError: a size below 1.
        """
        if min(num_slots, steps_per_dispatch, tokens_per_read) < 1 or (max_tokens_per_slot or 1) < 1:
            raise ValueError("num_slots, max_tokens_per_slot, steps_per_dispatch and tokens_per_read must be 1 or more")
        self._model = model
        self._num_slots = num_slots
        self._max_tokens = min(max_tokens_per_slot or model.config.context_length, model.config.context_length)
        self._sizes = {
            "num_steps": steps_per_dispatch,
            "max_slots": round_up(self._max_tokens, 64),
            "tokens_per_read": tokens_per_read,
        }
        self._lookahead = int(jax.default_backend() != "cpu") if lookahead is None else lookahead
        self._residents: dict[PrefixHandle, _Resident] = {}
        self._queue: dict[int, Live] = {}
        self._lives: dict[int, Live] = {}
        # In the order in which they are dispatched next.
        self._groups: dict[PrefixHandle | None, Group] = {}
        self._pending: collections.deque[Pending] = collections.deque()
        self._ids = itertools.count()
        self.num_dispatches = 0

    @property
    def busy(self) -> bool:
        """True while a request is unfinished."""
        return bool(self._lives)

    def add_prefix(self, prefix: KVPrefix) -> PrefixHandle:
        """Holds a prefix on the device until `drop_prefix`, padded so that prefixes of like size share programs."""
        handle = PrefixHandle(prefix.num_slots, int(prefix.next_position))
        padded = pad_slots(prefix, prefix_bucket(prefix.num_slots))
        self._residents[handle] = _Resident(self._model.decoding_prefix(padded))
        return handle

    def drop_prefix(self, handle: PrefixHandle) -> None:
        """Refuses new requests after a prefix; it is freed when the last one has ended.

        Raises:
          UserError: the engine does not hold it.
        """
        self._resident(handle).dropped = True
        self._free(handle)

    def submit(self, request: Request) -> int:
        """Queues a request.

        Returns:
          The id that its events carry.

        Raises:
          UserError: a prompt that the model cannot read or a slot cannot hold, no tokens
            wanted, more log-probabilities than tokens, or a prefix that the engine does not hold.
        """
        check_token_ids(self._model, request.prompt, request.prefix, room=request.max_tokens)
        if request.max_tokens < 1:
            raise UserError(f"max_tokens={request.max_tokens}: ask for at least one token")
        if not 0 <= request.top_logprobs <= self._model.config.vocab_size:
            raise UserError(
                f"top_logprobs={request.top_logprobs}: choose 0 to {self._model.config.vocab_size}, the vocabulary's size"
            )
        if len(request.prompt) + request.max_tokens > self._max_tokens:
            raise UserError(
                f"{len(request.prompt)} tokens + {request.max_tokens} to generate exceed the {self._max_tokens} of a "
                "slot: shorten the prompt or raise max_tokens_per_slot"
            )
        if request.prefix is not None:
            self._resident(request.prefix).users += 1
        live = Live(next(self._ids), request, frozenset(request.stop_ids))
        self._lives[live.request_id] = self._queue[live.request_id] = live
        return live.request_id

    def cancel(self, request_id: int) -> bool:
        """Ends a request without further events; False if it is over already."""
        live = self._lives.get(request_id)
        if live is not None:
            self._end(live)
        return live is not None

    def step(self) -> list[Event]:
        """Starts the next program and returns the requests' events since the last call.

        Events come in no particular order; a request has at most one.
        """
        while self._queue and sum(group.num_held for group in self._groups.values()) < self._num_slots:
            live = self._queue.pop(next(iter(self._queue)))
            self._group(live.request.prefix).add(live)
        for handle in [handle for handle, group in self._groups.items() if not group.num_held]:
            del self._groups[handle]
        started = False
        if self._groups:
            # Round robin.
            handle = next(iter(self._groups))
            group = self._groups[handle] = self._groups.pop(handle)
            pending = group.dispatch(more=bool(self._queue))
            started = True
            self.num_dispatches += 1
            if pending is not None:
                self._pending.append(pending)
        events: dict[int, Event] = {}
        while self._pending and (not started or len(self._pending) > self._lookahead):
            for event in self._collect(self._pending.popleft()):
                earlier = events.get(event.request_id)
                events[event.request_id] = event if earlier is None else _joined(earlier, event)
        return list(events.values())

    def run(
        self, requests: Sequence[Request], on_progress: Callable[[int], None] = lambda finished: None
    ) -> list[Generation]:
        """Answers requests and returns when all have ended.

        Args:
          on_progress: called after every step with the number of requests it finished;
            an exception from it ends the call and cancels the requests.

        Returns:
          One `Generation` per request, in order.

        Raises:
          UserError: as `submit`.
        """
        parts: dict[int, list[Event]] = {}
        place: dict[int, int] = {}
        try:
            # Prompts of like length are read together; shorter ones fill the rows that longer ones leave.
            for number in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt)):
                request_id = self.submit(requests[number])
                parts[request_id], place[request_id] = [], number
            unfinished = len(requests)
            while unfinished:
                finished = 0
                for event in self.step():
                    if event.request_id in parts:
                        parts[event.request_id].append(event)
                        finished += bool(event.stop_reason)
                unfinished -= finished
                on_progress(finished)
        except BaseException:
            for request_id in parts:
                self.cancel(request_id)
            raise
        results = {place[request_id]: _generation(events) for request_id, events in parts.items()}
        return [results[number] for number in range(len(requests))]

    def _resident(self, handle: PrefixHandle) -> _Resident:
        resident = self._residents.get(handle)
        if resident is None or resident.dropped:
            raise UserError("this prefix is not held by the engine: add it with add_prefix first")
        return resident

    def _free(self, handle: PrefixHandle) -> None:
        resident = self._residents[handle]
        if resident.dropped and not resident.users:
            del self._residents[handle]

    def _group(self, handle: PrefixHandle | None) -> Group:
        if handle not in self._groups:
            prefix = None if handle is None else self._residents[handle].prefix
            self._groups[handle] = Group(self._model, prefix, **self._sizes)
        return self._groups[handle]

    def _collect(self, pending: Pending) -> list[Event]:
        """Waits for the outputs of a dispatch and hands them to their requests."""
        tokens, top_ids, top = (np.asarray(part) for part in pending.outputs)
        events = []
        for column, live, steps in pending.rows:
            live.in_flight -= steps
            if live.over:
                continue
            new = tokens[tokens[:, column] >= 0, column].tolist()
            stop_reason = live.take(new)
            if stop_reason:
                self._end(live)
            if new:
                k = live.request.top_logprobs
                kept = (slice(len(new)), column, slice(k))
                events.append(
                    Event(live.request_id, new, stop_reason, top_ids[kept] if k else None, top[kept] if k else None)
                )
        return events

    def _end(self, live: Live) -> None:
        live.over = True
        del self._lives[live.request_id]
        handle = live.request.prefix
        if self._queue.pop(live.request_id, None) is None:
            self._groups[handle].release(live)
        if handle is not None:
            self._residents[handle].users -= 1
            self._free(handle)


def _joined(first: Event, second: Event) -> Event:
    tops = {}
    if first.top_ids is not None:
        tops = {
            name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("top_ids", "top_logprobs")
        }
    return Event(first.request_id, first.token_ids + second.token_ids, second.stop_reason, **tops)


def _generation(events: Sequence[Event]) -> Generation:
    tops = {}
    if events[0].top_ids is not None:
        tops = {
            name: np.concatenate([getattr(event, name) for event in events]) for name in ("top_ids", "top_logprobs")
        }
    return Generation([token for event in events for token in event.token_ids], events[-1].stop_reason, **tops)
