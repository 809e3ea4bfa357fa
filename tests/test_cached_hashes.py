"""Hashes of model files are remembered; the memory may be lost, and is not trusted for a file that changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cartridges_jax.formats import cache
from cartridges_jax.formats.cache import cached_sha256

# Of one length, which is enough to be remembered.
WEIGHTS, OTHER = b"weights" * 2**18, b"WEIGHTS" * 2**18


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WEIGHTS)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def change_unnoticed(path: Path, content: bytes) -> None:
    """Changes the bytes behind the cache's back: same size, time and inode."""
    status = path.stat()
    assert len(content) == status.st_size
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_unchanged_file_is_not_read_again(directory, file):
    assert cached_sha256(file) == sha256(WEIGHTS)
    change_unnoticed(file, OTHER)
    assert cached_sha256(file) == sha256(WEIGHTS)


def test_a_link_shares_the_hash_of_its_file(directory, file, tmp_path):
    """The hub's cache links every name of a snapshot to a blob."""
    (tmp_path / "link").symlink_to(file)
    cached_sha256(file)
    change_unnoticed(file, OTHER)
    assert cached_sha256(tmp_path / "link") == sha256(WEIGHTS)


@pytest.mark.parametrize("change", ["time", "size", "inode", "path"])
def test_a_changed_file_is_read_again(directory, file, change):
    cached_sha256(file)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    if change == "time":
        change_unnoticed(file, OTHER)
        os.utime(file, ns=(times[0], times[1] + 1))
    elif change == "size":
        file.write_bytes(OTHER + b"more")
        os.utime(file, ns=times)
    elif change == "inode":
        other = file.with_name("other")
        other.write_bytes(OTHER)
        os.utime(other, ns=times)
        os.replace(other, file)
    else:
        change_unnoticed(file, OTHER)
        file = file.rename(file.with_name("moved"))
    assert cached_sha256(file) == sha256(file.read_bytes())


@pytest.mark.parametrize(
    "damage", [b"", b"\xff{", b"[1]", b"{}", b'{"sha256": 7}', b'{"sha256": "short"}'], ids=lambda damage: str(damage)
)
def test_a_damaged_entry_only_costs_the_reading(directory, file, damage):
    cached_sha256(file)
    (entry,) = (directory / "hashes").iterdir()
    intact = entry.read_bytes()
    entry.write_bytes(damage)
    assert cached_sha256(file) == sha256(WEIGHTS)
    assert entry.read_bytes() == intact


def test_an_entry_without_a_hash_is_not_used(directory, file):
    cached_sha256(file)
    (entry,) = (directory / "hashes").iterdir()
    entry.write_text(entry.read_text().replace(sha256(WEIGHTS), "z" * 64))
    assert cached_sha256(file) == sha256(WEIGHTS)


def test_a_cache_that_cannot_be_written_only_costs_the_reading(directory, file):
    directory.write_text("a file where the directory would be")
    assert [cached_sha256(file) for _ in range(2)] == [sha256(WEIGHTS)] * 2


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(directory, file, monkeypatch):
    def hash_and_change(path):
        found = sha256(path.read_bytes())
        path.write_bytes(b"longer than before" + WEIGHTS)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cache, "sha256_of_file", hash_and_change)
        cached_sha256(file)
    assert not directory.exists()
    assert cached_sha256(file) == sha256(b"longer than before" + WEIGHTS)


def test_small_files_leave_no_entry(directory, file):
    file.write_bytes(b"{}")
    assert cached_sha256(file) == sha256(b"{}")
    assert not directory.exists()
