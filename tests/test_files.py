"""Files are written whole, with the umask's mode."""

from __future__ import annotations

import os
import stat

import pytest

from cartridges_jax.files import write_atomically


@pytest.fixture
def umask():
    """Sets the umask for one test."""
    before = os.umask(0o077)
    try:
        yield os.umask
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_gets_the_umasks_mode(tmp_path, umask, mask, mode):
    umask(mask)
    write_atomically(tmp_path / "a.json", "{}")
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


@pytest.mark.parametrize("content", ["é\n", "é\n".encode(), lambda file: file.write("é\n".encode())])
def test_text_bytes_and_functions_are_written(tmp_path, content):
    (tmp_path / "a").write_text("before")
    write_atomically(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    write_atomically(tmp_path / "a", "before")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", fails)
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_the_old_file_is_read_until_the_new_one_is_complete(tmp_path):
    write_atomically(tmp_path / "a", "before")
    seen = []

    def writes(file):
        file.write(b"after")
        seen.append((tmp_path / "a").read_text())

    write_atomically(tmp_path / "a", writes)
    assert seen == ["before"] and (tmp_path / "a").read_text() == "after"
