"""GGUF files, on small ones that the tests write."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.formats.sources import locate


def write_gguf(path: Path) -> np.ndarray:
    """A file with a few metadata values and tensors; returns the weight's exact values, [3, 64]."""
    weight = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.scale", 0.5)
    writer.add_bool("llama.flag", False)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é"])
    writer.add_tensor("weight", weight)
    writer.add_tensor("half", weight.astype(np.float16))
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("quantised", gguf.quants.quantize(weight, q8_0), raw_dtype=q8_0)
    writer.add_tensor("integers", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weight


def test_metadata_and_tensors_are_read_back(tmp_path):
    weight = write_gguf(tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.metadata["llama.block_count"] == 2
    assert file.metadata["llama.scale"] == 0.5
    assert file.metadata["llama.flag"] is False
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é"]
    assert file.metadata.get("absent") is None
    assert file.tensor_names == ["weight", "half", "quantised", "integers"]
    assert file.shape("weight") == (3, 64)
    np.testing.assert_array_equal(file.read("weight"), weight)
    np.testing.assert_array_equal(file.read("half"), weight.astype(np.float16).astype(np.float32))
    # Q8_0: 8-bit steps of each block's maximum.
    np.testing.assert_allclose(file.read("quantised"), weight, atol=np.abs(weight).max() / 127)
    assert file.read("quantised").dtype == np.float32
    assert file.sha256() == hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest()


def test_an_unknown_tensor_is_named(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="'blk.7.nothing'"):
        GGUFFile(tmp_path / "a.gguf").read("blk.7.nothing")


def test_every_type_is_read_that_the_gguf_package_dequantises_and_the_others_are_refused(tmp_path):
    path, blocks = tmp_path / "all.gguf", {}
    writer = gguf.GGUFWriter(path, "llama")
    for kind in gguf.GGMLQuantizationType:
        blocks[kind] = np.zeros((2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        writer.add_tensor(kind.name, blocks[kind], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, refused = GGUFFile(path), 0
    for kind, block in blocks.items():
        try:
            expected = gguf.quants.dequantize(block, kind)
        except NotImplementedError:
            refused += 1
            with pytest.raises(UserError, match=f"stored as {kind.name}, which cannot be dequantised"):
                file.read(kind.name)
        else:
            np.testing.assert_array_equal(file.read(kind.name), expected)
    assert 0 < refused < len(blocks)


def test_an_unsupported_tensor_type_is_named(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="'integers' is stored as I32"):
        GGUFFile(tmp_path / "a.gguf").read("integers")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.gguf: no such"):
        GGUFFile(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"GG"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UserError, match="not a GGUF"):
        GGUFFile(tmp_path / "a.gguf")


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for size in [*range(4, len(whole) - 32, 37), len(whole) - 32]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or damaged") as caught:
            GGUFFile(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)


def test_the_real_model_has_thirty_layers_and_square_query_weights():
    file = GGUFFile(locate("smollm2-135m-instruct"))
    assert file.metadata["llama.block_count"] == 30
    query = file.read("blk.0.attn_q.weight")
    assert query.shape == (576, 576)
    assert np.isfinite(query).all()
    assert 0.01 < query.std() < 1


@pytest.mark.parametrize("name", ["weight", "half", "quantised"])
@pytest.mark.parametrize(
    "index", [(slice(1, 2),), (slice(None), slice(5, 40)), (slice(-1, None), slice(-3, None)), (slice(3, 3),), (), None]
)
def test_a_part_of_a_tensor_is_that_part_of_the_whole(tmp_path, name, index):
    write_gguf(tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    part = file.read(name, index)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, file.read(name)[index or ()])


def test_reading_rows_dequantises_only_those():
    file = GGUFFile(locate("smollm2-135m-instruct"))  # its embedding, Q8_0, is [49152, 576]: 113 MB in float32
    tracemalloc.start()
    rows = file.read("token_embd.weight", (slice(100, 200),))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.shape == (100, 576)
    assert peak < 20 * rows.nbytes
