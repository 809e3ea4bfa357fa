"""A cartridge that is saved comes back bit for bit, or an error in words says why not."""

import json
import os
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cartridges import (
    CONFIG,
    CORPUS,
    H,
    K,
    L,
    P,
    assert_same,
    data_file,
    flip_byte,
    in_one_line,
    metadata_of,
    random_prefix,
    save,
)  # fmt: skip

from cartridges_jax import checkpoint
from cartridges_jax.cartridge import compose
from cartridges_jax.checkpoint import cartridges
from cartridges_jax.errors import UserError


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_cartridge_comes_back_bit_for_bit(tmp_path, rng, dtype, bias):
    prefix = compose(random_prefix(rng, 3, dtype, bias), random_prefix(rng, 5, dtype, bias))
    prefix = prefix.replace(positions=jnp.asarray([0, 2, 9, 0, 1, 2, 3, 8]), next_position=jnp.int32(21))
    if bias:
        prefix = prefix.replace(bias=prefix.bias.at[0, 0, 0].set(-jnp.inf))
    save(tmp_path / "c", prefix)
    assert_same(checkpoint.load_cartridge(tmp_path / "c").prefix, prefix)


def test_the_group_array_that_earlier_releases_wrote_is_ignored(tmp_path, rng, monkeypatch):
    prefix = random_prefix(rng, 6)
    today = cartridges._prefix_arrays
    monkeypatch.setattr(cartridges, "_prefix_arrays", lambda p: today(p) | {"group": np.zeros((6,), np.int32)})
    save(tmp_path / "c", prefix)
    assert "group" in json.loads((tmp_path / "c" / "cartridge.json").read_text())["arrays"]
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
        checkpoint.save_cartridge(tmp_path / "c", random_prefix(rng, 4), metadata_of(random_prefix(rng, 5)))


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
    checkpoint.check_compatible(metadata, model_name="moved", model_fingerprint="f" * 64, shape=(L, K, H))


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


def test_a_byte_that_orbax_lets_through_is_found_by_the_arrays_own_checksum(tmp_path, rng, monkeypatch):
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
