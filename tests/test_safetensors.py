"""Hugging Face directories: safetensors in one file or in shards, whole or damaged; the files are the tests' own."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from peers import save_file, torch

from cartridges_jax.errors import UserError
from cartridges_jax.formats.safetensors_files import SafetensorsDirectory

INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory with a config and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    return tmp_path


@pytest.fixture
def sharded(directory) -> Path:
    """Tensors "a" [4, 6] and "b" [3] in one shard, "c" [2] in another."""
    save_file({"a": torch.arange(24.0).reshape(4, 6), "b": torch.arange(3.0)}, directory / "one.safetensors")
    save_file({"c": torch.arange(2.0)}, directory / "two.safetensors")
    write_index(directory, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return directory


def write_index(directory: Path, table) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 116}, "weight_map": table}))


def write_raw(path: Path, header: dict | bytes, data: bytes, *, header_bytes: int | None = None) -> None:
    """A safetensors file put together by hand: 8 bytes of header length, the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)


def header_of(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def refusal_of(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        SafetensorsDirectory(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_come_back_in_the_dtype_they_are_stored_in(directory, rng):
    values = torch.from_numpy(rng.standard_normal((5, 7)).astype(np.float32))
    stored = {"full": values, "half": values.half(), "brain": values.bfloat16(), "scalar": torch.tensor(2.5)}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    opened = SafetensorsDirectory(directory)
    assert opened.tensor_names == ["brain", "full", "half", "scalar"]
    for name, dtype in {
        "full": np.float32,
        "half": np.float16,
        "brain": ml_dtypes.bfloat16,
        "scalar": np.float32,
    }.items():
        found = opened.read(name)
        assert found.dtype == dtype
        assert found.shape == opened.shape(name) == tuple(stored[name].shape)
        np.testing.assert_array_equal(found.astype(np.float32), stored[name].float().numpy())
    assert opened.config == {"model_type": "llama", "hidden_size": 4}
    assert opened.generation_config is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "index",
    [
        (slice(1, 3),),
        (slice(None), slice(2, 5)),
        (slice(-1, None), slice(0, -2)),
        (slice(0, 99), slice(1, 2), slice(None)),
        (slice(4, 9),),  # empty, at the end
        (slice(3, 1),),
        (),
        None,
    ],
)
def test_a_part_of_a_tensor_is_what_numpy_would_select(directory, rng, dtype, index):
    values = torch.from_numpy(rng.standard_normal((4, 6, 3)).astype(np.float32)).to(getattr(torch, dtype))
    save_file({"weight": values}, directory / "model.safetensors")
    found = SafetensorsDirectory(directory).read("weight", index)
    np.testing.assert_array_equal(found.astype(np.float32), values.float().numpy()[index or ()])


def test_a_tensor_without_elements_is_read(directory):
    save_file({"weight": torch.zeros(0, 3)}, directory / "model.safetensors")
    assert SafetensorsDirectory(directory).read("weight").shape == (0, 3)


@pytest.mark.parametrize("index", [(slice(None, None, 2),), (slice(None),) * 3])
def test_an_index_that_cannot_be_read_is_refused(sharded, index):
    with pytest.raises(ValueError):
        SafetensorsDirectory(sharded).read("a", index)


_READ_WITHIN = """
import resource, sys
from cartridges_jax.formats.safetensors_files import SafetensorsDirectory
opened = SafetensorsDirectory(sys.argv[1])
with open("/proc/self/status") as status:
    held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + 24 * 2**20,) * 2)
index = {"rows": (slice(0, 256),), "columns": (slice(None), slice(0, 256)), "all": None}[sys.argv[2]]
print(opened.read("big", index).nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process' own memory as Linux counts it")
def test_reading_a_part_takes_the_memory_of_that_part(directory):
    save_file({"big": torch.zeros(4096, 4096)}, directory / "model.safetensors")  # 64 MiB
    done = {
        part: subprocess.run([sys.executable, "-c", _READ_WITHIN, directory, part], capture_output=True, text=True)
        for part in ("rows", "columns", "all")
    }
    # 24 MiB are enough for 4 MiB, and the limit works: not for the whole tensor.
    assert done["rows"].stdout.strip() == done["columns"].stdout.strip() == str(4 * 2**20), done
    assert "MemoryError" in done["all"].stderr


def test_shards_are_one_file_to_the_reader(sharded):
    opened = SafetensorsDirectory(sharded)
    assert opened.tensor_names == ["a", "b", "c"]
    np.testing.assert_array_equal(opened.read("a", (slice(2, 3),)), [[12, 13, 14, 15, 16, 17]])
    np.testing.assert_array_equal(opened.read("c"), [0, 1])
    with pytest.raises(UserError, match="no tensor named 'd'.*the 3 there are"):
        opened.read("d")


def test_files_may_be_links_into_the_hubs_cache(sharded, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("hub") / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert SafetensorsDirectory(snapshot).tensor_names == ["a", "b", "c"]


def test_the_hash_is_that_of_sha256sum_and_follows_weights_and_config(sharded):
    before = SafetensorsDirectory(sharded).sha256()
    shell = subprocess.run(
        "sha256sum config.json one.safetensors two.safetensors | sha256sum",
        shell=True, cwd=sharded, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shell.stdout.split()[0] == before
    (sharded / "README.md").write_text("not part of the model")
    assert SafetensorsDirectory(sharded).sha256() == before
    (sharded / "config.json").write_text("{}")
    other_config = SafetensorsDirectory(sharded).sha256()
    save_file({"c": torch.ones(2)}, sharded / "two.safetensors")
    assert len({before, other_config, SafetensorsDirectory(sharded).sha256()}) == 3


def test_the_second_start_does_not_read_the_weights_for_their_hash(sharded, tmp_path, monkeypatch):
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path / "cache"))
    large = sharded / "two.safetensors"
    save_file({"c": torch.zeros(2**19)}, large)
    before = SafetensorsDirectory(sharded).sha256()
    # Another value behind the cache's back shows whether the file is read.
    status = large.stat()
    with open(large, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x40")
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert SafetensorsDirectory(sharded).read("c")[-1] != 0
    assert SafetensorsDirectory(sharded).sha256() == before
    os.utime(large)
    assert SafetensorsDirectory(sharded).sha256() != before


OPENS = """
import sys
from pathlib import Path
from cartridges_jax.formats.safetensors_files import SafetensorsDirectory

def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])

before = bytes_read()
directory = SafetensorsDirectory(sys.argv[1])
print(directory.sha256(), bytes_read() - before, float(directory.read("w1", (slice(0, 1),))[0]))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_the_second_start_of_two_gigabytes_reads_a_thousandth(directory, tmp_path, rng):
    """Both starts are processes of their own. The weights themselves are memory-mapped, which counts no bytes."""
    (tmp_path / "cache").mkdir()
    part = {f"w{number}": torch.from_numpy(rng.standard_normal(2**25, np.float32)) for number in range(4)}
    names = [f"model-{number}.safetensors" for number in range(4)]
    for number, name in enumerate(names):
        save_file({key if not number else f"{key}.{number}": value for key, value in part.items()}, directory / name)
    write_index(directory, {key if not n else f"{key}.{n}": name for n, name in enumerate(names) for key in part})
    total = sum((directory / name).stat().st_size for name in names)
    assert total > 2**31

    def start():
        environment = {**os.environ, "CARTRIDGES_JAX_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", OPENS, str(directory)], env=environment, capture_output=True, text=True, check=True
        )
        digest, num_bytes, value = done.stdout.split()
        assert float(value) == float(part["w1"][0])
        return digest, int(num_bytes)

    first, second = start(), start()
    assert first[0] == second[0]
    assert first[1] > total and second[1] < total / 1000


def test_the_generation_config_is_read(sharded):
    (sharded / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert SafetensorsDirectory(sharded).generation_config == {"eos_token_id": [1, 106]}
    (sharded / "generation_config.json").write_text("{")
    assert "generation_config.json: not valid JSON" in refusal_of(sharded)


def test_a_missing_directory_or_config_is_named(tmp_path):
    assert "nowhere: no such directory" in refusal_of(tmp_path / "nowhere")
    assert "config.json: no such file" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' occurs twice"),
        (b"[1]", "holds a JSON list"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(sharded, content, says):
    (sharded / "config.json").write_bytes(content)
    assert says in refusal_of(sharded)


def test_missing_weights_are_named(directory):
    assert "no weights" in refusal_of(directory)
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "only pickled weights (pytorch_model-00001-of-00002.bin), which are never read" in refusal_of(directory)


def test_shards_without_their_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    assert "2 .safetensors files (one.safetensors, …) but neither" in refusal_of(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": ', "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_no_table_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    assert INDEX in refusal_of(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    assert f"two.safetensors: missing, but {INDEX} names it" in refusal_of(sharded)


@pytest.mark.parametrize("shard", ["/etc/passwd", "../two.safetensors", "sub/two.safetensors", "..", "", "c.bin"])
def test_an_index_that_names_anything_but_weights_beside_it_is_refused(sharded, shard):
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": shard})
    assert f"{shard!r} is not the name of a .safetensors file in the same directory" in refusal_of(sharded)


def test_an_index_and_shards_that_disagree_are_refused(sharded):
    table = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    write_index(sharded, {**table, "c": "one.safetensors", "b": "two.safetensors"})
    assert "tensor 'b' is not in two.safetensors" in refusal_of(sharded)
    write_index(sharded, {**table, "d": "two.safetensors"})
    assert "tensor 'd' is not in two.safetensors" in refusal_of(sharded)
    write_index(sharded, {name: table[name] for name in "ac"})
    assert f"one.safetensors: tensor 'b' is not in {INDEX}" in refusal_of(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"b": torch.zeros(3), "c": torch.zeros(2)}, sharded / "two.safetensors")
    assert "tensor 'b' is both in one.safetensors and in two.safetensors" in refusal_of(sharded)


@pytest.mark.parametrize("dtype", ["int64", "float64", "float8_e4m3fn", "bool"])
def test_other_dtypes_are_refused_by_name_before_anything_is_read(directory, dtype):
    save_file({"weight": torch.zeros(2, 3).to(getattr(torch, dtype))}, directory / "model.safetensors")
    assert "tensor 'weight' is stored as" in refusal_of(directory)


@pytest.mark.parametrize(
    "header, num_data, header_bytes",
    [
        (header_of(), 8, 10**6),  # a header longer than the file
        (header_of(), 8, 2**63),
        (header_of(), 8, 11),  # shorter than it is
        (header_of(), 4, None),  # data cut off
        (header_of(), 12, None),  # data that belongs to nothing
        (header_of(offsets=(0, 800)), 8, None),
        (header_of(offsets=(8, 0)), 8, None),
        (header_of(shape=(3,)), 8, None),
        (header_of(shape=(2**62, 4)), 8, None),
        (header_of(dtype="Q9"), 8, None),
        (b"[]", 8, None),
        (b"\xff\xff", 8, None),
    ],
)
def test_a_damaged_header_is_refused(directory, header, num_data, header_bytes):
    file = directory / "model.safetensors"
    write_raw(file, header_of(), bytes(8))
    assert SafetensorsDirectory(directory).shape("weight") == (2,)
    write_raw(file, header, bytes(num_data), header_bytes=header_bytes)
    assert "model.safetensors: truncated or damaged" in refusal_of(directory)


def test_a_file_truncated_anywhere_is_refused(directory):
    file = directory / "model.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2)}, file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert "truncated or damaged" in refusal_of(directory)
