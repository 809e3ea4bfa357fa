"""A run's directory: its stages, the inputs of each, and whether it is done."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cartridges_jax.errors import UserError
from cartridges_jax.files import write_atomically
from cartridges_jax.parallel import ALONE, Job

_PACKAGE = Path(__file__).resolve().parents[1]
_RECORD = "run.json"
_LOCK = ".lock"
# The time that a network's disk may take to show one host what another wrote.
_SHARED_SECONDS = 60.0


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False))


def read_json(path: Path) -> Any:
    """Reads a JSON file that `write_json` wrote.

    Raises:
      UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: delete it and rerun; only its stage is repeated") from None


def _stages_of(record: Path) -> dict[str, Any]:
    # The record only serves to report what changed: a damaged one costs nothing else.
    try:
        return dict(json.loads(record.read_text("utf-8"))["stages"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def code_hash(*parts: str, root: Path = _PACKAGE) -> str:
    """sha256 over the package's code below the given parts ("models", "rope.py", …).

    Comments, docstrings and formatting do not count: only a change of the program reruns a stage.

    Args:
      root: the package's directory.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        path = root / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(f"{file.relative_to(root).as_posix()}\0{_program(file.read_bytes())}\0".encode())
    return digest.hexdigest()


@functools.cache  # a file belongs to several stages
def _program(source: bytes) -> str:
    """A canonical form of the source's syntax tree, without docstrings and other strings without effect."""
    return _canonical(ast.parse(source))


def _canonical(node: Any) -> str:
    # `ast.dump` differs between versions of Python in how it writes empty fields.
    if isinstance(node, ast.AST):
        fields = (f"{name}={_canonical(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(_canonical(item) for item in node if not _is_lone_string(item))}]"
    return repr(node)


def _is_lone_string(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a stage's numbers.

    jax and jaxlib make the programs, numpy's generators draw chunks, seeds and orders (their streams may change between
    versions), and optax computes the updates. Of the others the format of their result is fixed by the model's own files
    (tokenizers, jinja2, gguf, safetensors), or they hold no arithmetic (flax, orbax, pyarrow).
    """
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")}


def _check_alike(stage: str, inputs: Mapping[str, Any], job: Job) -> None:
    """Raises UserError where a host was started with other settings, files or code than process 0."""
    theirs, ours = job.from_first(lambda: dict(inputs)), json.loads(json.dumps(inputs))
    differ = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if differ:
        raise UserError(
            f"{stage}: {', '.join(differ)} differ between this host and the first: start the same command with the same code "
            "and files on all"
        )


class Stage:
    """One stage's directory for one set of inputs.

    Attributes:
      name: "study", "train" or "evaluate".
      key: hash of the inputs; the directory's name.
      directory: the stage's results, also unfinished ones.
      done: whether it is finished.
    """

    def __init__(self, parent: Path, name: str, inputs: Mapping[str, Any], job: Job):
        self.name = name
        self.inputs = dict(inputs)
        self.key = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:16]
        self.directory = parent / name / self.key
        self._result = self.directory / "result.json"
        self._seconds = self.directory / "seconds.json"
        self._job = job
        _check_alike(name, self.inputs, job)
        if job.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
        self.done = job.from_first(self._result.exists)

    def result(self) -> dict[str, Any]:
        """The finished stage's result, as given to `finish`."""
        return read_json(self._result)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Marks the stage done, once every process has called this."""
        self._job.wait_for_all()
        if self._job.is_first:
            write_json(self._result, dict(result))
        self.done = True
        return dict(result)

    def spent(self) -> float:
        """Seconds of work so far, over all attempts."""
        return read_json(self._seconds)["seconds"] if self._seconds.exists() else 0.0

    @contextlib.contextmanager
    def clock(self, already: float = 0.0) -> Iterator[_Clock]:
        """Adds the block's seconds to the stage's; `tick()` writes them, in case the run is killed.

        Args:
          already: seconds that were spent on the stage before it was opened.
        """
        clock = _Clock(self._seconds if self._job.is_first else None, self.spent() + already)
        try:
            yield clock
        finally:
            clock.tick(0.0)


class _Clock:
    def __init__(self, path: Path | None, before: float):
        self._path, self._before = path, before
        self._start = self._written = time.monotonic()

    def tick(self, at_most_every: float = 5.0) -> None:
        now = time.monotonic()
        if self._path is not None and now - self._written >= at_most_every:
            write_json(self._path, {"seconds": self._before + now - self._start})
            self._written = now


class Workdir:
    """A run's directory, held by one job at a time.

    Process 0 writes in it (self-study's shards are written by all), and every process
    reads: it is on a disk that their hosts share.

    Attributes:
      path: the directory.
    """

    def __init__(self, path: Path, job: Job = ALONE):
        """Creates the directory or opens an earlier run's.

        Raises:
          UserError: it cannot be written, or holds something that is not a run.
        """
        self.path, self._job = path, job
        self._stages: dict[str, Any] = {}
        if job.is_first:
            self._create()

    def _create(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(f"workdir {path} is a file: give a directory")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UserError(
                f"workdir {path} cannot be written ({error.strerror}): choose another with --workdir"
            ) from None
        # A run that was killed at its start left its lock, or its record half-written.
        beginnings = (_LOCK, f".{_RECORD}.")
        others = [entry.name for entry in path.iterdir() if not entry.name.startswith(beginnings)]
        if others and not (path / _RECORD).exists():
            raise UserError(
                f"workdir {path} holds files of something else (such as {sorted(others)[0]}): "
                "choose an empty or new directory with --workdir"
            )
        self._stages = _stages_of(path / _RECORD)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other jobs from working in this directory.

        Raises:
          UserError: one already does, or this process does not see the directory of process 0.
        """
        with contextlib.ExitStack() as stack:
            token = self._job.from_first(lambda: stack.enter_context(self._locked()))
            self._require_the_same(token)
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[str]:
        """Holds the lock; yields a token that no other holder has."""
        with open(self.path / _LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another run is working in {self.path}: wait for it, or choose another --workdir"
                ) from None
            except OSError as error:
                raise UserError(
                    f"workdir {self.path} is on a disk that cannot lock files ({error.strerror}): mount it with locks "
                    "(Lustre: -o flock), or choose another --workdir"
                ) from None
            token = secrets.token_hex(8)
            file.truncate(0)
            file.write(token)
            file.flush()
            # The file stays open: a network's disk would show it to other hosts only after its cache's time.
            os.fsync(file.fileno())
            self._save()
            yield token

    def _require_the_same(self, token: str) -> None:
        end = time.monotonic() + _SHARED_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if (self.path / _LOCK).read_text() == token:
                    return
            if time.monotonic() > end:
                raise UserError(
                    f"workdir {self.path} is not that of process 0: --workdir must be on a disk that all hosts share"
                )
            time.sleep(0.2)

    def require_space(self, num_bytes: int) -> None:
        """Raises UserError where the disk has less room than the run will need."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise UserError(
                f"the run needs about {num_bytes / 1e6:.0f} MB in {self.path}, only {free / 1e6:.0f} MB are free: "
                "make room, or choose another disk with --workdir"
            )

    def stage(self, name: str, inputs: Mapping[str, Any]) -> tuple[Stage, list[str]]:
        """A stage, and the changes in its inputs since the last run (empty the first time).

        Args:
          inputs: everything that the stage's outcome depends on, as flat JSON values.
        """
        stage = Stage(self.path, name, inputs, self._job)
        before = self._stages.get(name)
        changes = (
            []
            if before is None
            else [
                f"{key} {_short(before.get(key))} -> {_short(stage.inputs.get(key))}"
                for key in sorted({*before, *stage.inputs})
                if before.get(key) != stage.inputs.get(key)
            ]
        )
        self._stages[name] = stage.inputs
        self._save()
        return stage, changes

    def _save(self) -> None:
        if self._job.is_first:
            write_json(self.path / _RECORD, {"format": 1, "stages": self._stages})


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # The start of a hash is enough to tell two apart.
    return text if len(text) <= 32 else f"{text[:9]}…"
