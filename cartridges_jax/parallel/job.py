"""The processes of a job, one or many: their messages, and how they end together.

Arrays go between processes within compiled programs. Small values (a decision of process 0,
a request to stop) go through the key-value store of JAX's coordination service, which runs
in process 0.

A thread in every process watches the others. It learns of a request to stop that any of them
received, and stops all after the same step. It also ends its own process with a plain line,
where JAX alone would wait forever or for a long time, when another process

    ended     and reported why, with an error of its own;
    is lost   its thread gave no sign of life for `peer_seconds`;
    stalls    no process made progress for `stall_seconds`; the one furthest behind is named.

When process 0 is lost the store is gone, and JAX's client ends the others at once.
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

# The time that a process has to end by itself once it knows that another one has ended.
_GRACE_SECONDS = 10.0
# The interval at which the watch checks the others and gives a sign of life.
_BEAT_SECONDS = 1.0


class Job:
    """A job of one process: it decides alone, waits for no other and needs no watch.

    `ManyProcesses` is the same for a job of many. The work runs inside `with job:`.

    Attributes:
      num_processes: the number of processes.
      process: the index of this one.
      is_first: whether this is process 0, which writes the run's files, logs and reports for all.
    """

    num_processes, process, is_first = 1, 0, True

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        pass

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Returns in every process the JSON value that `make` gives in process 0."""
        return make()

    def arrays_from_first(self, arrays: Any) -> Any:
        """Returns in every process the NumPy arrays of process 0; the others pass any of the same shapes."""
        return arrays

    def wait_for_all(self) -> None:
        """Returns once every process has called this."""

    def made_progress(self) -> None:
        """Reports progress; long work calls it now and then, so that it does not count as stalled."""

    def note(self, signum: int) -> None:
        """Records a signal that asks this process to stop; may be called from the signal's handler."""

    def stop_wanted(self, signum: int | None) -> int | None:
        """The signal that asked any process to stop; `signum` is this one's, if any.

        For work that each process may stop at a different place.
        """
        return signum

    def stops_here(self, signum: int | None) -> bool:
        """Returns whether all processes stop now, because a signal asked one of them to.

        Polled by every process after every step; returns True after the same step in all.
        """
        return signum is not None


ALONE = Job()


class ManyProcesses(Job):
    """See the module and `Job`.

    Args:
      peer_seconds: after this time without a sign of life a process counts as lost.
      stall_seconds: after this time without a step of any process the job counts as stalled.
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
            # The others' watches would report a process that left early.
            self.wait_for_all()
            self._closing.set()
            self._watch.join()
            return
        followed = _comes_of_others(error)
        if followed:
            # Mostly a program breaks because another process left it: the watch soon knows which and why.
            _until(lambda: self._ended is not None, self._peer_seconds + _GRACE_SECONDS)
        self._closing.set()
        with contextlib.suppress(JobEnded):
            if self._ended is None:
                code = getattr(error, "exit_code", 1)
                self._tell("ended", {"process": self.process, "code": code, "why": one_line(error)})
            self._tell(f"seen/{self.process}", True)
            if self.is_first:
                # The store ends with this process: the others must have read it. One that waits within a program
                # reports that when its own grace time is over.
                _until(lambda: len(self._told("seen/")) == self.num_processes, 2 * _GRACE_SECONDS)
        if followed and self._ended is not None:
            raise self._ended from error

    # Calls of the work

    def from_first(self, make: Callable[[], Any]) -> Any:
        self.made_progress()
        key = self._next_key("from_first")
        if self.is_first:
            self._tell(key, make())
        return self._wait_for(key)

    def arrays_from_first(self, arrays: Any) -> Any:
        # One at a time: while it is sent, an array is whole on every device, twice.
        return jax.tree.map(lambda array: np.asarray(multihost_utils.broadcast_one_to_all(array)), arrays)

    def wait_for_all(self) -> None:
        self.made_progress()
        key = self._next_key("all")
        self._tell(f"{key}/{self.process}", True)
        for process in range(self.num_processes):
            self._wait_for(f"{key}/{process}")

    def made_progress(self) -> None:
        self._progress += 1
        if self._ended is not None:
            raise self._ended

    def note(self, signum: int) -> None:
        # For the watch to pass on: the work may be waiting for others.
        self._own_signal = signum

    def stop_wanted(self, signum: int | None) -> int | None:
        wanted = self._stop_signal if signum is None else signum
        if wanted is None:
            # Where all stop, no process may learn first that another one has already ended.
            self.made_progress()
        return wanted

    def stops_here(self, signum: int | None) -> bool:
        self.made_progress()
        with self._lock:
            self._steps += 1
            return self._last_step is not None and self._steps >= self._last_step

    # The store

    def _next_key(self, purpose: str) -> str:
        # The same in every process, because all make the same calls in the same order.
        self._messages += 1
        # Between two such calls one process may have more work than another: only the calls tell which is behind.
        self._progress = self._messages << 32
        return f"{purpose}/{self._messages}"

    def _tell(self, key: str, value: Any, *, again: bool = False) -> None:
        """Writes a key; one that exists keeps its value unless `again`."""
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
        """(whether the key was written within that many seconds, its value)."""
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
        return JobEnded(f"lost process 0, through which the others communicate ({one_line(error)[:120]})")

    # The watch

    def _watch_others(self) -> None:
        try:
            self._end(self._trouble())
        except JobEnded as ended:
            self._end(ended)

    def _trouble(self) -> JobEnded | None:
        """Returns when another process is in trouble, or this one closes."""
        # Time is counted in beats of this watch: while the machine sleeps, no process counts as lost.
        progress_at = 0
        # Per process: its beat, its progress, and the beat of this watch at which the first was new.
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
                    progress_at = beat
                if number != before[0]:
                    heard[int(name)] = number, progress, beat
            for process, (_, _, when) in heard.items():
                if (beat - when) * _BEAT_SECONDS > self._peer_seconds:
                    return JobEnded(f"lost {self._named(process)}: no sign of life for {self._peer_seconds:.0f} s")
            if (beat - progress_at) * _BEAT_SECONDS > self._stall_seconds:
                behind = min(heard, key=lambda process: heard[process][1])
                return JobEnded(
                    f"no process has made progress for {self._stall_seconds:.0f} s; {self._named(behind)} is furthest behind (if they "
                    "were loading or compiling, give a longer --stall_seconds)"
                )
        return None

    def _agree_on_last_step(self) -> None:
        """Agrees on the step after the last one that any process has taken: no process has passed it, and none can.

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
                        # A process that has ended does not answer: the next beat reports it.
                        return
                    if time.monotonic() - begin > self._peer_seconds:
                        raise JobEnded(f"lost {self._named(process)}: it did not report its step")
                taken.append(found[1])
            self._last_step = max(taken) + 1

    def _end(self, ended: JobEnded | None) -> None:
        """Raises `ended` in the work's next call, and ends the process if no call comes."""
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
    """Whether XLA's runtime raised it; in places it raises a ValueError that begins with the name of a status."""
    named = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)) is not None
    return named or isinstance(error, jax.errors.JaxRuntimeError)


def _comes_of_others(error: BaseException) -> bool:
    """Whether a program may have failed because another process left it."""
    return _is_of_runtime(error) and not re.search("RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED", str(error))


def _until(true: Callable[[], bool], seconds: float) -> None:
    """Returns once it is, or after that many seconds."""
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
