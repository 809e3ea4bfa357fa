"""What is saved comes back bit for bit, or an error in words says why not."""
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cartridges_jax import checkpoint
from cartridges_jax.cartridge import compose, from_plain_tokens
from cartridges_jax.checkpoint import cartridges
from cartridges_jax.errors import UserError

L, K, P, H = 2, 3, 16, 8
CORPUS = checkpoint.CorpusSource(name="a book", sha256="ab" * 32, tokens=1234)
CONFIG = {"learning_rate": 2e-2, "seeds": [1, 2], "nested": {"tail": "drop", "none": None}}


@pytest.fixture
def rng():
    """Fresh inputs in every run: no behaviour here depends on the values."""
    return np.random.default_rng()


def random_prefix(rng, num_slots=P, dtype=jnp.float32, bias=False):
    shape = (L, K, num_slots, H)
    prefix = from_plain_tokens(
        jnp.asarray(rng.standard_normal(shape), dtype), jnp.asarray(rng.standard_normal(shape), dtype)
    )
    if bias:
        prefix = prefix.replace(bias=jnp.asarray(rng.standard_normal(shape[:3]), jnp.float32))
    return prefix


def metadata_of(prefix, **changes):
    mask = np.arange(prefix.num_slots) > 0
    given = dict(
        model_name="tiny",
        model_fingerprint="f" * 64,
        learning_mask=mask,
        corpus=CORPUS,
        step=7,
        config=CONFIG,
    )
    return checkpoint.CartridgeMetadata.of(prefix, **{**given, **changes})


def save(directory, prefix, **changes):
    metadata = metadata_of(prefix, **changes)
    checkpoint.save_cartridge(directory, prefix, metadata)
    return metadata


def assert_same(tree, other):
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def in_one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def data_file(directory):
    """The largest file: where the arrays' values are."""
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


# --- Cartridges --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_cartridge_comes_back_bit_for_bit(tmp_path, rng, dtype, bias):
    prefix = compose(random_prefix(rng, 3, dtype, bias), random_prefix(rng, 5, dtype, bias))
    prefix = prefix.replace(positions=jnp.asarray([0, 2, 9, 0, 1, 2, 3, 8]), next_position=21)
    if bias:
        prefix = prefix.replace(bias=prefix.bias.at[0, 0, 0].set(-jnp.inf))
    save(tmp_path / "c", prefix)
    assert_same(checkpoint.load_cartridge(tmp_path / "c").prefix, prefix)


def test_metadata_comes_back_as_it_was_with_exactly_the_frozen_slots(tmp_path, rng):
    prefix = random_prefix(rng, 6)
    mask = np.array([False, True, True, False, False, True])
    metadata = save(tmp_path / "c", prefix, learning_mask=mask)
    loaded = checkpoint.load_cartridge(tmp_path / "c").metadata
    assert loaded == metadata
    np.testing.assert_array_equal(loaded.learning_mask, mask)
    assert loaded.num_frozen == 3
    assert loaded.config == CONFIG and loaded.corpus == CORPUS


@pytest.mark.parametrize("mask", [[True] * 4, [False] * 4, [True, True, False, False]], ids=str)
def test_a_learning_mask_survives_as_ranges(rng, mask):
    metadata = metadata_of(random_prefix(rng, 4), learning_mask=mask)
    assert metadata.learning_mask.tolist() == mask


def test_a_learning_mask_of_another_length_is_refused(rng):
    with pytest.raises(ValueError, match="one bool per slot"):
        metadata_of(random_prefix(rng, 4), learning_mask=[True] * 3)


def test_metadata_of_another_prefix_is_refused(tmp_path, rng):
    with pytest.raises(ValueError, match="CartridgeMetadata.of"):
        checkpoint.save_cartridge(
            tmp_path / "c", random_prefix(rng, 4), metadata_of(random_prefix(rng, 5))
        )


def test_the_record_tells_a_reader_what_the_cartridge_is(tmp_path, rng):
    save(tmp_path / "c", random_prefix(rng))
    record = json.loads((tmp_path / "c" / "cartridge.json").read_text())
    assert record["format_version"] == 1
    assert (record["num_slots"], record["num_frozen"], record["frozen_slots"]) == (P, 1, [[0, 1]])
    assert record["position_convention"] == "0..P-1, next_position P"
    assert record["arrays"]["keys"]["shape"] == [L, K, P, H]
    assert record["corpus"]["tokens"] == 1234


def test_positions_that_are_not_plain_are_said_to_be_explicit(rng):
    plain = random_prefix(rng)
    assert metadata_of(plain).position_convention == checkpoint.PLAIN_POSITIONS
    for other in (plain.replace(next_position=P + 1), plain.replace(positions=plain.positions + 1)):
        assert metadata_of(other).position_convention == checkpoint.EXPLICIT_POSITIONS


def test_a_cartridge_fits_its_own_model_even_renamed(rng):
    metadata = metadata_of(random_prefix(rng))
    checkpoint.check_compatible(
        metadata, model_name="moved", model_fingerprint="f" * 64, shape=(L, K, H)
    )


@pytest.mark.parametrize(
    "model, words",
    [
        (dict(model_fingerprint="0" * 64, shape=(L, K, H)), "config or tokenizer"),
        (dict(model_fingerprint="f" * 64, shape=(L, K, H + 1)), r"\(2, 3, 8\), and big has \(2, 3, 9\)"),
    ],
    ids=["fingerprint", "shape"],
)
def test_a_cartridge_of_another_model_is_refused_in_words(rng, model, words):
    with pytest.raises(UserError, match=words) as error:
        checkpoint.check_compatible(metadata_of(random_prefix(rng)), model_name="big", **model)
    assert "trained for tiny" in in_one_line(error)


def test_a_directory_that_is_no_cartridge_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("text")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a cartridge") as error:
            checkpoint.load_cartridge(path)
        assert str(path) in in_one_line(error)


def test_a_byte_flipped_in_any_file_is_an_error_and_never_garbage(tmp_path, rng):
    save(tmp_path / "c", random_prefix(rng))
    for path in [p for p in (tmp_path / "c").rglob("*") if p.is_file()]:
        intact = path.read_bytes()
        flip_byte(path, rng.integers(len(intact)))
        with pytest.raises(UserError, match="damaged|not a cartridge|format version"):
            checkpoint.load_cartridge(tmp_path / "c")
        path.write_bytes(intact)
    checkpoint.load_cartridge(tmp_path / "c")


def test_a_byte_that_orbax_lets_through_is_found_by_the_arrays_own_checksum(
    tmp_path, rng, monkeypatch
):
    save(tmp_path / "c", random_prefix(rng))
    path = data_file(tmp_path / "c")
    flip_byte(path, path.stat().st_size // 2)
    monkeypatch.setattr(cartridges, "verify_files", lambda *_: None)
    with pytest.raises(UserError, match="does not match its checksum|unreadable"):
        checkpoint.load_cartridge(tmp_path / "c")


def test_a_missing_or_truncated_file_is_an_error_that_names_it(tmp_path, rng):
    save(tmp_path / "c", random_prefix(rng))
    path = data_file(tmp_path / "c")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{path.name} does not match"):
        checkpoint.load_cartridge(tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "arrays")
    with pytest.raises(UserError, match="is missing") as error:
        checkpoint.load_cartridge(tmp_path / "c")
    in_one_line(error)


def test_a_hand_edited_record_is_found_out(tmp_path, rng):
    save(tmp_path / "c", random_prefix(rng))
    path = tmp_path / "c" / "cartridge.json"
    path.write_text(path.read_text().replace('"next_position": 16', '"next_position": 17'))
    with pytest.raises(UserError, match="record does not match"):
        checkpoint.load_cartridge(tmp_path / "c")


def test_a_newer_format_is_refused_and_an_older_one_migrated(tmp_path, rng, monkeypatch):
    prefix = random_prefix(rng)
    monkeypatch.setattr(cartridges, "FORMAT_VERSION", 2)
    save(tmp_path / "newer", prefix)
    monkeypatch.undo()
    with pytest.raises(UserError, match="version 2.*up to 1; update"):
        checkpoint.load_cartridge(tmp_path / "newer")

    def rename_and_negate(record, arrays):
        return {**record, "model_name": "renamed"}, {**arrays, "values": -arrays["values"]}

    save(tmp_path / "older", prefix)
    monkeypatch.setattr(cartridges, "FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="no longer reads"):
        checkpoint.load_cartridge(tmp_path / "older")
    monkeypatch.setattr(cartridges, "MIGRATIONS", {1: rename_and_negate})
    loaded = checkpoint.load_cartridge(tmp_path / "older")
    assert loaded.metadata.model_name == "renamed"
    assert_same(loaded.prefix.values, -prefix.values)


@pytest.mark.parametrize("name", ["keys", "values", "bias"])
def test_values_that_are_not_finite_are_not_saved(tmp_path, rng, name):
    prefix = random_prefix(rng, bias=True)
    spoiled = prefix.replace(**{name: getattr(prefix, name).at[1, 0, 3].set(jnp.nan)})
    save(tmp_path / "c", prefix)
    with pytest.raises(UserError, match=f"{name} are NaN.*layer 1"):
        save(tmp_path / "c", spoiled)
    assert_same(checkpoint.load_cartridge(tmp_path / "c").prefix, prefix)


def test_saving_again_replaces_the_cartridge_and_leaves_nothing_beside_it(tmp_path, rng):
    save(tmp_path / "c", random_prefix(rng))
    second = random_prefix(rng, 5)
    save(tmp_path / "c", second)
    assert_same(checkpoint.load_cartridge(tmp_path / "c").prefix, second)
    assert os.listdir(tmp_path) == ["c"]


def test_a_directory_with_other_files_is_never_replaced(tmp_path, rng):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a cartridge"):
        save(tmp_path, random_prefix(rng))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("rename", [1, 2])
def test_a_crash_at_either_rename_leaves_a_cartridge_that_loads_and_can_be_replaced(
    tmp_path, rng, monkeypatch, rename
):
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


def test_a_full_disk_leaves_the_old_cartridge_and_names_the_directory(tmp_path, rng, monkeypatch):
    prefix = random_prefix(rng)
    save(tmp_path / "c", prefix)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
    with pytest.raises(UserError, match="0.3 MB free") as error:
        save(tmp_path / "c", random_prefix(rng))
    assert str(tmp_path / "c") in in_one_line(error)
    assert_same(checkpoint.load_cartridge(tmp_path / "c").prefix, prefix)


def test_a_disk_that_fills_up_midway_gives_the_same_words(tmp_path, rng, monkeypatch):
    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    monkeypatch.setattr(cartridges, "_write_arrays", full)
    with pytest.raises(UserError, match="free some space"):
        save(tmp_path / "c", random_prefix(rng))
    assert os.listdir(tmp_path) == []


# --- Train state -------------------------------------------------------------------------


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
    return jax.tree.map(
        lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )


@pytest.fixture
def checkpoints(tmp_path):
    with_directory = checkpoint.TrainCheckpoints(tmp_path / "train", keep=2)
    yield with_directory
    with_directory.close()


def reopened(tmp_path, **options):
    return checkpoint.TrainCheckpoints(tmp_path / "train", keep=2, **options)


def test_a_train_state_comes_back_bit_for_bit_from_a_reopened_directory(
    tmp_path, checkpoints, rng
):
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
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    tmp_path, checkpoints, rng, caplog, damage
):
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


def test_training_on_past_a_damaged_checkpoint_keeps_it_aside_and_the_intact_ones_in_place(
    tmp_path, checkpoints, rng
):
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


def test_when_no_checkpoint_is_intact_the_error_names_the_remedy_and_deletes_nothing(
    tmp_path, checkpoints
):
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


def test_what_a_killed_save_began_is_gone_after_the_next_save(tmp_path, checkpoints):
    (tmp_path / "train" / "7.orbax-checkpoint-tmp").mkdir()
    checkpoints.save(8, {"x": jnp.ones(3)}, {})
    assert os.listdir(tmp_path / "train") == ["8"]


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


# --- Killed while saving -----------------------------------------------------------------

SAVES_FOR_EVER = """
import sys, pathlib, itertools
import jax.numpy as jnp
from cartridges_jax import checkpoint
from cartridges_jax.cartridge import from_plain_tokens

root = pathlib.Path(sys.argv[1])
checkpoints = checkpoint.TrainCheckpoints(root / "train", keep=2)
for step in itertools.count((checkpoints.latest_step() or 0) + 1):
    slots = jnp.full((2, 2, 4096, 16), float(step))
    prefix = from_plain_tokens(slots, slots)
    metadata = checkpoint.CartridgeMetadata.of(
        prefix, model_name="m", model_fingerprint="f", learning_mask=[True] * 4096,
        corpus=checkpoint.CorpusSource("c", "s", 1), step=step, config={})
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
        checkpoints = reopened(tmp_path)
        wanted = {"x": jax.ShapeDtypeStruct((2, 2, 4096, 16), jnp.float32)}
        state, extra = checkpoints.restore(wanted)
        assert extra["step"] == checkpoints.latest_step() >= known
        np.testing.assert_array_equal(state["x"], extra["step"])
        checkpoints.close()


def test_a_train_state_of_12_mb_is_saved_well_below_a_second(tmp_path, rng):
    """Of a 256-slot cartridge with Adam's moments on a small model."""
    leaf = lambda: jnp.asarray(rng.standard_normal((2, 30, 3, 256, 22)), jnp.float32)  # noqa: E731
    state = {name: leaf() for name in ("prefix", "mu", "nu")}
    assert 11e6 < sum(x.nbytes for x in state.values()) < 13e6
    checkpoints = reopened(tmp_path)
    seconds = []
    for step in range(1, 5):
        started = time.perf_counter()
        checkpoints.save(step, state, {})
        seconds.append(time.perf_counter() - started)
    print("seconds:", seconds)
    assert min(seconds) < 0.8
