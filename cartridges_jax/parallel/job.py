"""The processes of a job, one or many: what they tell each other, and how they end together.

Arrays go between processes within compiled programs. What is small (a decision of the first
process, a wish to stop) goes through the key-value store of JAX's coordination service, which
lives in the first process.

A thread in every process watches over the others. It hears of a stop that any of them was
asked for, and lets all stop after the same step; and it ends its own process with a plain
line, where JAX alone would wait for ever or long, when another one

    ended     and said why, with an error of its own;
    is lost   its thread has not been heard of for `peer_seconds`;
    stalls    nobody has got on for `stall_seconds`; who got least far is named.

When the first process is lost the store is gone, and JAX's client ends the others at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cartridges_jax.errors import JobEnded, UserError, one_line

# How long a process has to end by itself once it knows that another one has ended.
_GRACE_SECONDS = 10.0
# How often the watch looks about and lets itself be heard of.
_BEAT_SECONDS = 1.0


class Job:
    """A job of one process: it decides alone, waits for nobody and needs no watch.

    `ManyProcesses` is the same for a job of many. Around the work stands `with job:`.

    Attributes:
      num_processes: how many there are.
      process: the index of this one.
      is_first: whether this one reads and writes for all: files of the run, logs, reports.
    """

    num_processes, process, is_first = 1, 0, True

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        pass

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process, a JSON value, in every process."""
        return make()

    def arrays_from_first(self, arrays: Any) -> Any:
        """A tree of the first process's NumPy arrays in every process; the others give any of the same shapes."""
        return arrays

    def wait_for_all(self) -> None:
        """Returns when every process has come here."""

    def got_on(self) -> None:
        """To be called by work that takes long, every now and then: it does not stall."""

    def note(self, signum: int) -> None:
        """This process was told to stop by a signal; may be called from the signal's handler."""

    def stop_wanted(self, signum: int | None) -> int | None:
        """The signal that some process was told to stop by; `signum` is this one's, if any.

        Work that others need not follow stops where it hears of it.
        """
        return signum

    def stops_here(self, signum: int | None) -> bool:
        """Whether all processes stop now, if one was told to by a signal.

        To be called by every process after each of the same steps: says so after the same one to all.
        """
        return signum is not None


ALONE = Job()


class ManyProcesses(Job):
    """See the module and `Job`.

    Args:
      peer_seconds: without a sign of life from another process, until it counts as lost.
      stall_seconds: without a step from anybody, until the job counts as stalled.
    """

    def __init__(self, *, peer_seconds: float, stall_seconds: float):
        self.num_processes, self.process = jax.process_count(), jax.process_index()
        self.is_first = self.process == 0
        self._peer_seconds, self._stall_seconds = peer_seconds, stall_seconds
        self._messages = 0
        self._progress = 0
        self._lock = threading.Lock()
        self._steps = 0  # calls of stops_here
        self._last_step: int | None = None  # the call after which all stop
        self._own_signal: int | None = None
        self._stop_signal: int | None = None  # the first that came to any process
        self._ended: JobEnded | None = None
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._watch_others, name="watch-over-job", daemon=True)

    def __enter__(self) -> ManyProcesses:
        self._tell(f"host/{self.process}", socket.gethostname())
        self._watch.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            # A process that left early would be missed by the others' watches.
            self.wait_for_all()
            self._closing.set()
            self._watch.join()
            return
        followed = _comes_of_others(error)
        if followed:
            # What breaks is mostly a program that another process has left: the watch soon knows which and why.
            _until(lambda: self._ended is not None, self._peer_seconds + _GRACE_SECONDS)
        self._closing.set()
        with contextlib.suppress(JobEnded):
            if self._ended is None:
                code = getattr(error, "exit_code", 1)
                self._tell("ended", {"process": self.process, "code": code, "why": one_line(error)})
            self._tell(f"seen/{self.process}", True)
            if self.is_first:
                # The store ends with this process: the others must have read what is in it. One that waits within a
                # program says so when its own grace is over.
                _until(lambda: len(self._told("seen/")) == self.num_processes, 2 * _GRACE_SECONDS)
        if followed and self._ended is not None:
            raise self._ended from error

    # What the work asks for

    def from_first(self, make: Callable[[], Any]) -> Any:
        self.got_on()
        key = self._next_key("from_first")
        if self.is_first:
            self._tell(key, make())
        return self._wait_for(key)

    def arrays_from_first(self, arrays: Any) -> Any:
        # One at a time: while it is sent, an array is whole on every device, twice.
        return jax.tree.map(lambda array: np.asarray(multihost_utils.broadcast_one_to_all(array)), arrays)

    def wait_for_all(self) -> None:
        self.got_on()
        key = self._next_key("all")
        self._tell(f"{key}/{self.process}", True)
        for process in range(self.num_processes):
            self._wait_for(f"{key}/{process}")

    def got_on(self) -> None:
        self._progress += 1
        if self._ended is not None:
            raise self._ended

    def note(self, signum: int) -> None:
        # For the watch to pass on: the work may be waiting for others.
        self._own_signal = signum

    def stop_wanted(self, signum: int | None) -> int | None:
        wanted = self._stop_signal if signum is None else signum
        if wanted is None:
            # Where all stop, nobody is to hear first that another one has already ended.
            self.got_on()
        return wanted

    def stops_here(self, signum: int | None) -> bool:
        self.got_on()
        with self._lock:
            self._steps += 1
            return self._last_step is not None and self._steps >= self._last_step

    # The store

    def _next_key(self, purpose: str) -> str:
        # The same in every process, because all ask for the same things in the same order.
        self._messages += 1
        # Between two meetings one process may have more to do than another: only within them does its count tell who is behind.
        self._progress = self._messages << 32
        return f"{purpose}/{self._messages}"

    def _tell(self, key: str, value: Any, *, again: bool = False) -> None:
        """Where a key was told before, the first word holds, unless it is told `again`."""
        try:
            _store().key_value_set(f"job/{key}", json.dumps(value), allow_overwrite=again)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise self._no_store(error) from None

    def _told(self, directory: str) -> dict[str, Any]:
        try:
            return {
                key.rsplit("/", 1)[1]: json.loads(value)
                for key, value in _store().key_value_dir_get(f"job/{directory}")
            }
        except jax.errors.JaxRuntimeError as error:
            raise self._no_store(error) from None

    def _look(self, key: str, seconds: float) -> tuple[bool, Any]:
        """(whether the key was told within so many seconds, its value)."""
        try:
            return True, json.loads(_store().blocking_key_value_get(f"job/{key}", int(1000 * seconds)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return False, None
            raise self._no_store(error) from None

    def _wait_for(self, key: str) -> Any:
        while True:
            found, value = self._look(key, 1.0)
            if found:
                return value
            if self._ended is not None:
                raise self._ended

    def _no_store(self, error: Exception) -> JobEnded:
        return JobEnded(f"lost the first process, which the others meet through ({one_line(error)[:120]})")

    # The watch

    def _watch_others(self) -> None:
        try:
            self._end(self._trouble())
        except JobEnded as ended:
            self._end(ended)

    def _trouble(self) -> JobEnded | None:
        """Returns when another process is in trouble, or this one closes."""
        # Time is counted in beats of this watch: if the machine sleeps, nobody is lost meanwhile.
        got_on_at = 0
        # Of every process its beat, how far it had got, and at which beat of this one that was new.
        heard = {process: (0, 0, 0) for process in range(self.num_processes)}
        for beat in itertools.count(1):
            self._tell(f"beat/{self.process}", [beat, self._progress], again=True)
            found, ended = self._look("ended", _BEAT_SECONDS)
            if self._closing.is_set():
                return None
            if found:
                return JobEnded(f"{self._named(ended['process'])} ended: {ended['why']}", ended["code"])
            if self._last_step is None:
                if self._own_signal is not None:
                    self._tell("stop/signal", self._own_signal)
                for signum in self._told("stop/").values():
                    self._stop_signal = signum
                    self._agree_on_last_step()
            for name, (number, progress) in self._told("beat/").items():
                before = heard[int(name)]
                if progress != before[1]:
                    got_on_at = beat
                if number != before[0]:
                    heard[int(name)] = number, progress, beat
            for process, (_, _, when) in heard.items():
                if (beat - when) * _BEAT_SECONDS > self._peer_seconds:
                    return JobEnded(f"lost {self._named(process)}: no sign of life for {self._peer_seconds:.0f} s")
            if (beat - got_on_at) * _BEAT_SECONDS > self._stall_seconds:
                behind = min(heard, key=lambda process: heard[process][1])
                return JobEnded(
                    f"no process has got on for {self._stall_seconds:.0f} s; {self._named(behind)} got least far (if they were "
                    "loading or compiling, give a longer --stall_seconds)"
                )
        return None

    def _agree_on_last_step(self) -> None:
        """One step behind the one that any process has taken: nobody has passed it, and nobody can.

        Steps are taken together, but programs are started ahead of their results; while the lock
        is held this process starts none.
        """
        with self._lock:
            self._tell(f"steps/{self.process}", self._steps)
            taken = []
            for process in range(self.num_processes):
                begin = time.monotonic()
                while not (found := self._look(f"steps/{process}", 1.0))[0]:
                    if self._closing.is_set() or self._look("ended", 0.01)[0]:
                        # One that has ended says nothing here: the next beat reports it.
                        return
                    if time.monotonic() - begin > self._peer_seconds:
                        raise JobEnded(f"lost {self._named(process)}: it did not say where to stop")
                taken.append(found[1])
            self._last_step = max(taken) + 1

    def _end(self, ended: JobEnded | None) -> None:
        """Lets the work hear of it at its next call, and ends the process if it does not call."""
        if ended is None:
            return
        self._ended = ended
        if self._closing.wait(_GRACE_SECONDS):
            return
        with contextlib.suppress(JobEnded):
            self._tell(f"seen/{self.process}", True)
        print(f"error: {ended}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(ended.exit_code)

    def _named(self, process: int) -> str:
        host = self._told("host/").get(str(process))
        return f"process {process}" + (f" on {host}" if host else "")


def _is_of_runtime(error: BaseException) -> bool:
    """Whether XLA's runtime raised it: as a ValueError, in places, whose text begins with the name of the status."""
    named = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)) is not None
    return named or isinstance(error, jax.errors.JaxRuntimeError)


def _comes_of_others(error: BaseException) -> bool:
    """Whether it may be that a program broke because another process has left it."""
    return _is_of_runtime(error) and not re.search("RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED", str(error))


def _until(true: Callable[[], bool], seconds: float) -> None:
    """Returns when it is, or after so many seconds."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)


def _store() -> Any:
    """JAX's client of its coordination service; it has no public name."""
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise UserError("the processes of this job are not connected: parallel.start_job connects them")
    return client
