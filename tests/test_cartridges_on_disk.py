"""A cartridge that is saved comes back bit for bit, or an error in words says why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cartridges import (
    CONFIG,
    DOCUMENTS,
    H,
    K,
    L,
    P,
    assert_same,
    data_file,
    flip_byte,
    in_one_line,
    metadata_of,
    model,
    random_prefix,
    save,
    save_version_1,
)  # fmt: skip

from cartridges_jax import checkpoint
from cartridges_jax.checkpoint import cartridges
from cartridges_jax.errors import UserError


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_cartridge_comes_back_bit_for_bit(tmp_path, rng, dtype, bias):
    prefix = random_prefix(rng, 8, dtype, bias)
    prefix = prefix.replace(positions=jnp.asarray([0, 2, 9, 0, 1, 2, 3, 8]))
    prefix = prefix.replace(next_position=prefix.next_position + 13)
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
    assert loaded.config == CONFIG and loaded.documents == DOCUMENTS


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
    assert record["format_version"] == 2
    assert (record["num_slots"], record["num_frozen"], record["frozen_slots"]) == (P, 1, [[0, 1]])
    assert record["position_convention"] == "0..P-1, next_position P"
    assert record["arrays"]["keys"]["shape"] == [L, K, P, H]
    assert [document["tokens"] for document in record["documents"]] == [1000, 234]
    assert [record[f"{name}_sha256"][0] for name in ("weights", "tokenizer", "chat_template")] == ["a", "b", "c"]


def test_positions_that_are_not_plain_are_said_to_be_explicit(rng):
    plain = random_prefix(rng)
    assert metadata_of(plain).position_convention == checkpoint.PLAIN_POSITIONS
    for other in (plain.replace(next_position=P + 1), plain.replace(positions=plain.positions + 1)):
        assert metadata_of(other).position_convention == checkpoint.EXPLICIT_POSITIONS


def test_a_cartridge_fits_its_own_model_even_renamed(rng):
    checkpoint.check_compatible(metadata_of(random_prefix(rng)), model(name="/moved"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(fingerprint="0" * 64), "config or tokenizer"),
        (
            dict(config=SimpleNamespace(num_layers=L, num_kv_heads=K, head_dim=H + 1)),
            r"\(2, 3, 8\), and big has \(2, 3, 9\)",
        ),
        (
            dict(source_sha256="0" * 64),
            "weights aaaaaaaaaaaa, and big has the weights 000000000000.*allow_other_weights",
        ),
    ],
    ids=["fingerprint", "shape", "weights"],
)
def test_a_cartridge_of_another_model_is_refused_in_words(rng, changes, words):
    with pytest.raises(UserError, match=words) as error:
        checkpoint.check_compatible(metadata_of(random_prefix(rng)), model(name="big", **changes))
    assert "trained for tiny-org/tiny" in in_one_line(error)


def test_other_weights_are_accepted_where_asked_for_and_another_model_never(rng):
    metadata = metadata_of(random_prefix(rng))
    checkpoint.check_compatible(metadata, model(source_sha256="0" * 64), allow_other_weights=True)
    with pytest.raises(UserError, match="config or tokenizer"):
        checkpoint.check_compatible(metadata, model(fingerprint="0" * 64), allow_other_weights=True)


# The traces that a cartridge has of the machine that it was trained on


def test_no_file_of_a_cartridge_holds_a_path_of_this_machine(tmp_path, rng):
    config = {
        "model": str(tmp_path / "models" / "tiny.gguf"),
        "corpus": [str(tmp_path / "a.txt"), str(tmp_path / "*.md")],
        "cartridge": {"init": f"pretrained:{tmp_path}/old"},
    }
    save(tmp_path / "c", random_prefix(rng), config=config, model=model(name=str(tmp_path / "models" / "tiny.gguf")))
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert os.fsencode(tmp_path) not in path.read_bytes(), path
        assert tmp_path.name.encode() not in path.read_bytes(), path
    metadata = checkpoint.load_cartridge(tmp_path / "c").metadata
    assert (metadata.model_name, metadata.model_is_local) == ("tiny.gguf", True)
    assert metadata.config == {
        "model": "tiny.gguf",
        "corpus": ["a.txt", "*.md"],
        "cartridge": {"init": "pretrained:old"},
    }


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "org/name", "org/name@main"])
def test_a_public_model_keeps_its_name(rng, name):
    metadata = metadata_of(random_prefix(rng), model=model(name=name), config={"model": name})
    assert (metadata.model_name, metadata.model_is_local, metadata.config["model"]) == (name, False, name)


def test_a_local_directory_that_looks_like_a_repository_is_local(rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    metadata = metadata_of(random_prefix(rng), model=model(name="org/name"))
    assert (metadata.model_name, metadata.model_is_local) == ("name", True)


def test_a_chat_with_a_cartridge_of_a_local_model_asks_for_its_path(tmp_path, rng):
    save(tmp_path / "c", random_prefix(rng), model=model(name="/elsewhere/tiny.gguf"))
    program = Path(checkpoint.__file__).parents[2] / "launch" / "chat.py"
    done = subprocess.run(
        [sys.executable, str(program), f"--cartridge={tmp_path / 'c'}", "--prompt=Hello"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: this cartridge was trained for the local model 'tiny.gguf': give its path with --model=PATH"
    ]


def test_a_stored_config_has_no_licence_flag_and_no_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").touch()
    given = {
        "accept_license": True,
        "relative": "texts/a.md",
        "home": "~/book.txt",
        "named": "pretrained:texts/a.md",
        "address": "https://example.org/a/b.html",
        "server": "openai:https://example.org/v1",
        "mesh": "data:2,fsdp:4",
        "prompt": "either/or: a question\nof two lines",
        "long": "a/" * 5000,
        "rate": 0.02,
        "none": None,
        "pair": (1, "/abs/b"),
    }
    assert checkpoint.portable_config(given) == {
        "relative": "a.md",
        "home": "book.txt",
        "named": "pretrained:a.md",
        "pair": [1, "b"],
        **{name: given[name] for name in ("address", "server", "mesh", "prompt", "long", "rate", "none")},
    }
    assert given["accept_license"] is True


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


def test_a_newer_format_is_refused(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(cartridges, "FORMAT_VERSION", 3)
    save(tmp_path / "newer", random_prefix(rng))
    monkeypatch.undo()
    with pytest.raises(UserError, match="version 3.*up to 2; update"):
        checkpoint.load_cartridge(tmp_path / "newer")


def test_older_formats_are_migrated_one_version_at_a_time(tmp_path, rng, monkeypatch):
    prefix = random_prefix(rng)
    save(tmp_path / "older", prefix)
    monkeypatch.setattr(cartridges, "FORMAT_VERSION", 4)
    with pytest.raises(UserError, match="no longer reads"):
        checkpoint.load_cartridge(tmp_path / "older")
    steps = {
        2: lambda record, arrays: ({**record, "step": 10 * record["step"]}, {**arrays, "values": -arrays["values"]}),
        3: lambda record, arrays: ({**record, "step": record["step"] + 1}, arrays),
    }
    monkeypatch.setattr(cartridges, "MIGRATIONS", steps)
    loaded = checkpoint.load_cartridge(tmp_path / "older")
    assert loaded.metadata.step == 71
    assert_same(loaded.prefix.values, -prefix.values)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_cartridge_of_version_1_loads(tmp_path, rng, bias):
    prefix = random_prefix(rng, 8, jnp.bfloat16, bias)
    prefix = prefix.replace(positions=jnp.asarray([0, 2, 9, 0, 1, 2, 3, 8]))
    save_version_1(tmp_path / "c", prefix, np.arange(8, dtype=np.int32) // 3, model_name="org/name")
    loaded = checkpoint.load_cartridge(tmp_path / "c")
    assert_same(loaded.prefix, prefix)
    metadata = loaded.metadata
    assert metadata.documents == (checkpoint.DocumentSource("a book", "ab" * 32, 1234),) and metadata.num_tokens == 1234
    assert metadata.frozen_slots == ((0, 2),) and metadata.step == 7
    assert metadata.model_options == {"dtype": "bfloat16"}
    assert metadata.config == {"model": "org/name", "dtype": "bfloat16", "train": {"steps": 9}}
    # It knows no weights: config and tokenizer decide.
    checkpoint.check_compatible(metadata, model(source_sha256="0" * 64))
    with pytest.raises(UserError, match="config or tokenizer"):
        checkpoint.check_compatible(metadata, model(fingerprint="0" * 64))


def test_a_cartridge_of_version_1_is_saved_as_version_2(tmp_path, rng):
    save_version_1(tmp_path / "old", random_prefix(rng), np.zeros(P, np.int32), model_name=str(tmp_path / "tiny.gguf"))
    old = checkpoint.load_cartridge(tmp_path / "old")
    assert (old.metadata.model_name, old.metadata.model_is_local) == ("tiny.gguf", True)
    checkpoint.save_cartridge(tmp_path / "new", old.prefix, old.metadata)
    record = json.loads((tmp_path / "new" / "cartridge.json").read_text())
    assert record["format_version"] == 2 and "group" not in record["arrays"] and "corpus" not in record
    assert checkpoint.load_cartridge(tmp_path / "new").metadata == old.metadata


def test_a_damaged_cartridge_of_version_1_is_refused(tmp_path, rng):
    save_version_1(tmp_path / "c", random_prefix(rng), np.zeros(P, np.int32))
    path = tmp_path / "c" / "cartridge.json"
    path.write_text(path.read_text().replace('"tokens": 1234', '"tokens": 1235'))
    with pytest.raises(UserError, match="record does not match"):
        checkpoint.load_cartridge(tmp_path / "c")


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
