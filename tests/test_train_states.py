"""A train state that is saved comes back bit for bit, or the intact one before it does."""

import errno
import logging
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_cartridges import assert_same, data_file, flip_byte, in_one_line, random_prefix

from cartridges_jax import checkpoint
from cartridges_jax.errors import UserError


def random_state(rng):
    """A prefix that trains, with Adam's state and a step: what the trainer keeps."""
    prefix = random_prefix(rng, bias=True)
    moments = optax.adam(1e-2).init(prefix)
    noise = lambda x: jnp.asarray(rng.standard_normal(x.shape)).astype(x.dtype)  # noqa: E731
    return {
        "step": jnp.asarray(rng.integers(1000), jnp.int32),
        "prefix": prefix.astype(jnp.bfloat16),
        "optimizer": jax.tree.map(noise, moments),
        "nothing": jnp.zeros((0, 3)),
        "host": rng.integers(9, size=4),
    }


def abstract(state):
    return jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), state)


@pytest.fixture
def checkpoints(tmp_path):
    with_directory = checkpoint.TrainCheckpoints(tmp_path / "train", keep=2)
    yield with_directory
    with_directory.close()


def reopened(tmp_path, **options):
    return checkpoint.TrainCheckpoints(tmp_path / "train", keep=2, **options)


def test_a_train_state_comes_back_bit_for_bit_from_a_reopened_directory(tmp_path, checkpoints, rng):
    state = random_state(rng)
    checkpoints.save(3, state, {"rows": 12, "loss": 0.1, "names": ["a"]})
    restored, extra = reopened(tmp_path).restore(abstract(state))
    assert_same(restored, state)
    assert isinstance(restored["host"], np.ndarray) and isinstance(restored["step"], jax.Array)
    assert extra == {"rows": 12, "loss": 0.1, "names": ["a"]}


def test_a_leaf_comes_back_with_the_sharding_that_is_asked_for(checkpoints, rng):
    state = {"x": jnp.asarray(rng.standard_normal(8))}
    checkpoints.save(1, state, {})
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    wanted = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    assert checkpoints.restore(wanted)[0]["x"].sharding == sharding
    assert not checkpoints.restore(abstract(state))[0]["x"].committed


def test_the_last_checkpoints_stay_and_older_ones_go(checkpoints, rng):
    states = {step: {"x": jnp.asarray(rng.standard_normal(5))} for step in (1, 5, 6)}
    for step, state in states.items():
        checkpoints.save(step, state, {"step": step})
    assert checkpoints.latest_step() == 6
    assert_same(checkpoints.restore(abstract(states[5]), step=5)[0], states[5])
    with pytest.raises(UserError, match=r"no checkpoint of step 1 .* has \[5, 6\]"):
        checkpoints.restore(abstract(states[1]), step=1)


def test_a_step_at_or_before_the_last_is_refused(checkpoints):
    checkpoints.save(5, {"x": jnp.ones(3)}, {})
    for step in (4, 5):
        with pytest.raises(UserError, match=f"step {step} cannot be saved"):
            checkpoints.save(step, {"x": jnp.zeros(3)}, {})


def test_without_checkpoints_there_is_no_latest_step_and_restoring_says_so(checkpoints):
    assert checkpoints.latest_step() is None
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore({"x": jnp.ones(3)})


@pytest.mark.parametrize(
    "other", [{"x": jnp.ones(4)}, {"x": jnp.ones(3, jnp.bfloat16)}, {"y": jnp.ones(3)}, {}], ids=str
)
def test_a_state_of_another_configuration_is_refused_and_not_called_damaged(checkpoints, other):
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
    with pytest.raises(UserError, match="another configuration") as error:
        checkpoints.restore(other)
    in_one_line(error)
    assert checkpoints.latest_step() == 1


def truncate(step):
    path = data_file(step)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(step):
    path = data_file(step)
    flip_byte(path, path.stat().st_size // 2)


def flip_without_file_checksums(step):
    """As after a crash right behind orbax's commit: only the arrays' own are there."""
    flip(step)
    (step / "files.json").unlink()


def lose_the_record(step):
    shutil.rmtree(step / "record")


DAMAGE = [truncate, flip, flip_without_file_checksums, lose_the_record]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, checkpoints, rng, caplog, damage):
    states = {step: random_state(rng) for step in (10, 20)}
    for step, state in states.items():
        checkpoints.save(step, state, {"step": step})
    damage(tmp_path / "train" / "20")
    resumed = reopened(tmp_path)
    with caplog.at_level(logging.WARNING, logger="cartridges_jax.checkpoint"):
        restored, extra = resumed.restore(abstract(states[10]))
    assert_same(restored, states[10])
    assert extra == {"step": 10} and resumed.latest_step() == 10
    assert "step 20 is damaged" in caplog.text


def test_training_on_past_a_damaged_checkpoint_keeps_it_aside_and_the_intact_ones_in_place(tmp_path, checkpoints, rng):
    states = {step: {"x": jnp.asarray(rng.standard_normal(500))} for step in (10, 20)}
    for step, state in states.items():
        checkpoints.save(step, state, {})
    flip(tmp_path / "train" / "20")
    resumed = reopened(tmp_path)
    resumed.restore(abstract(states[10]))
    resumed.save(20, states[20], {"again": True})
    assert sorted(os.listdir(tmp_path / "train")) == ["10", "20", "damaged-20"]
    restored, extra = reopened(tmp_path).restore(abstract(states[20]))
    assert_same(restored, states[20])
    assert extra == {"again": True}


def test_when_no_checkpoint_is_intact_the_error_names_the_remedy_and_deletes_nothing(tmp_path, checkpoints):
    state = {"x": jnp.arange(1000.0)}
    for step in (1, 2):
        checkpoints.save(step, state, {})
        truncate(tmp_path / "train" / str(step))
    resumed = reopened(tmp_path)
    for _ in range(2):  # and says the same when asked again
        with pytest.raises(UserError, match="no intact checkpoint.*delete that directory") as error:
            resumed.restore(state)
    assert str(tmp_path / "train") in in_one_line(error)
    assert sorted(os.listdir(tmp_path / "train")) == ["1", "2"]


def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path, checkpoints, monkeypatch):
    state = {"x": jnp.arange(1000.0)}
    checkpoints.save(1, state, {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
        with pytest.raises(UserError, match="0.3 MB free") as error:
            checkpoints.save(2, state, {})
    assert str(tmp_path / "train") in in_one_line(error)
    assert_same(checkpoints.restore(state)[0], state)
    checkpoints.save(2, state, {})
    assert checkpoints.latest_step() == 2


def test_a_disk_that_fills_up_midway_leaves_the_checkpoints_before_it_and_nothing_else(
    tmp_path, checkpoints, monkeypatch
):
    state = {"x": jnp.arange(1000.0)}
    checkpoints.save(1, state, {})

    def full(step, **_):
        (tmp_path / "train" / f"{step}.orbax-checkpoint-tmp").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(UserError, match="free some space"):
            checkpoints.save(2, state, {})
    assert os.listdir(tmp_path / "train") == ["1"]
    checkpoints.save(2, state, {})
    assert checkpoints.latest_step() == 2


def test_a_disk_that_fills_up_behind_the_arrays_leaves_a_checkpoint_that_can_be_restored(
    tmp_path, checkpoints, rng, monkeypatch
):
    states = {step: {"x": jnp.asarray(rng.standard_normal(500))} for step in (1, 2)}
    checkpoints.save(1, states[1], {})

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cartridges_jax.checkpoint.train_state.file_checksums", full)
    with pytest.raises(UserError, match="free some space"):
        checkpoints.save(2, states[2], {})
    assert sorted(os.listdir(tmp_path / "train")) == ["1", "2"]
    resumed = reopened(tmp_path)
    assert_same(resumed.restore(abstract(states[2]))[0], states[2])
    assert resumed.latest_step() == 2


def test_a_state_may_be_donated_as_soon_as_an_asynchronous_save_returns(tmp_path, rng):
    state = {"x": jnp.asarray(rng.standard_normal(300_000), jnp.float32)}
    before = np.array(state["x"])
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpoints = reopened(tmp_path, asynchronous=True)
    wanted = abstract(state)
    checkpoints.save(1, state, {})
    overwrite(state["x"]).block_until_ready()
    assert state["x"].is_deleted()
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore(wanted)[0]["x"], before)
    checkpoints.close()


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep=0"):
        checkpoint.TrainCheckpoints(tmp_path, keep=0)
