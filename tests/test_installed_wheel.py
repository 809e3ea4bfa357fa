"""The built wheel by itself: in an empty folder, the command trains a cartridge and chats with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import DOCUMENT, SMALL, talker_gguf  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory that holds the package as its wheel has it, and nothing of the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT)], check=True, timeout=600)
    (wheel,) = directory.glob("cartridges_jax-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(directory / "site"), str(wheel)], check=True, timeout=600
    )
    return directory / "site"


@pytest.mark.long
def test_the_command_of_the_wheel_trains_and_chats_in_an_empty_folder(installed, talker_gguf, tmp_path):
    assert (installed / "cartridges_jax" / "py.typed").exists()
    (tmp_path / "my.txt").write_text(DOCUMENT)
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}

    def cartridges(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(installed / "bin" / "cartridges"), *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    said = cartridges("train", "my.txt", "--out", "my.cartridge", f"--config.model={talker_gguf}", *small)
    assert "Cartridge: my.cartridge" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.cartridge", "my.cartridge.run", "my.txt"]
    assert cartridges("chat", "my.cartridge", f"--model={talker_gguf}", "--prompt=What has shed 4?").strip()
