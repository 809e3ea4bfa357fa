"""A save that ends in the middle leaves what was there before, whole."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cartridges import assert_same, random_prefix, save

from cartridges_jax import checkpoint

SAVES_FOR_EVER = """
import sys, pathlib, itertools, types
import jax.numpy as jnp
from cartridges_jax import checkpoint
from cartridges_jax.cartridge import from_plain_tokens

root = pathlib.Path(sys.argv[1])
checkpoints = checkpoint.TrainCheckpoints(root / "train", keep=2)
for step in itertools.count((checkpoints.latest_step() or 0) + 1):
    slots = jnp.full((2, 2, 4096, 16), float(step))
    prefix = from_plain_tokens(slots, slots)
    model = types.SimpleNamespace(
        name="m", fingerprint="f", source_sha256="w", tokenizer_sha256="t", chat_template_sha256="c")
    metadata = checkpoint.CartridgeMetadata.of(
        prefix, model=model, learning_mask=[True] * 4096,
        documents=[checkpoint.DocumentSource("d", "s", 1)], step=step, config={})
    checkpoint.save_cartridge(root / "c", prefix, metadata)
    checkpoints.save(step, {"x": slots}, {"step": step})
    print(step, flush=True)
"""


def test_a_process_killed_while_saving_leaves_a_whole_cartridge_and_checkpoint(tmp_path, rng):
    known = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=pathlib.Path(checkpoint.__file__).parents[2],
        )
        try:
            known = int(process.stdout.readline())
            # A cartridge that another process replaces all the while loads all the same.
            deadline = time.monotonic() + rng.uniform(0.3, 0.8)
            while time.monotonic() < deadline:
                assert checkpoint.load_cartridge(tmp_path / "c").metadata.step >= known
        finally:
            process.send_signal(signal.SIGKILL)
            known = max([known, *map(int, process.communicate()[0].split())])
        loaded = checkpoint.load_cartridge(tmp_path / "c")
        assert loaded.metadata.step >= known
        np.testing.assert_array_equal(loaded.prefix.keys, loaded.metadata.step)
        checkpoints = checkpoint.TrainCheckpoints(tmp_path / "train", keep=2)
        wanted = {"x": jax.ShapeDtypeStruct((2, 2, 4096, 16), jnp.float32)}
        state, extra = checkpoints.restore(wanted)
        assert extra["step"] == checkpoints.latest_step() >= known
        np.testing.assert_array_equal(state["x"], extra["step"])
        checkpoints.close()


@pytest.mark.parametrize("rename", [1, 2])
def test_a_crash_at_either_rename_leaves_a_cartridge_that_loads_and_can_be_replaced(tmp_path, rng, monkeypatch, rename):
    first, second = random_prefix(rng), random_prefix(rng)
    save(tmp_path / "c", first)
    calls, real = [], os.rename

    def crash(*paths):
        if tmp_path / "c" in paths:  # orbax renames files of its own
            calls.append(paths)
            if len(calls) == rename:
                raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing tidies up
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "c", second)
    assert_same(checkpoint.load_cartridge(tmp_path / "c").prefix, first)
    save(tmp_path / "c", second)
    assert_same(checkpoint.load_cartridge(tmp_path / "c").prefix, second)
    assert os.listdir(tmp_path) == ["c"]


def test_what_a_killed_save_began_is_gone_after_the_next_save(tmp_path):
    checkpoints = checkpoint.TrainCheckpoints(tmp_path / "train", keep=2)
    (tmp_path / "train" / "7.orbax-checkpoint-tmp").mkdir()
    checkpoints.save(8, {"x": jnp.ones(3)}, {})
    assert os.listdir(tmp_path / "train") == ["8"]
    checkpoints.close()
