"""Conversation shards: what is written comes back, and damage is named."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartridges_jax.data.conversations import read_shard, write_shard
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.errors import PassingFailure, UserError


def ragged_top(rng, num_tokens, k=5):
    """Between 0 and k entries for every token, in token order."""
    counts = rng.integers(0, k + 1, num_tokens)
    total = int(counts.sum())
    return TopLogprobs(
        token_idx=np.repeat(np.arange(num_tokens, dtype=np.int32), counts),
        token_id=rng.integers(0, 50_000, total).astype(np.int32),
        logprobs=-rng.exponential(size=total).astype(np.float32),
        shape=(num_tokens, k),
    )


def random_conversation(rng, index):
    question, answer = (rng.integers(0, 50_000, size).tolist() for size in (4, int(rng.integers(1, 12))))
    return Conversation(
        messages=[
            # Every other user turn has entries too: those of a wrong message would show.
            Message("user", f"Wo liegt Område {index}? 👩‍🔬", question, ragged_top(rng, 4) if index % 2 else None),
            Message("assistant", "In the north.\n\x00", answer, ragged_top(rng, len(answer))),
        ],
        system_prompt="You read: “…”",
        metadata={"id": f"c{index}", "chunk_span": [index, index + 100], "seed": index, "stop_reason": "stop"},
    )


def assert_same(found: Conversation, expected: Conversation):
    assert (found.metadata, found.system_prompt, found.type) == (
        expected.metadata,
        expected.system_prompt,
        expected.type,
    )
    assert len(found.messages) == len(expected.messages)
    for one, other in zip(found.messages, expected.messages):
        assert (one.role, one.content, one.token_ids) == (other.role, other.content, other.token_ids)
        assert (one.top_logprobs is None) == (other.top_logprobs is None)
        if one.top_logprobs is not None:
            assert one.top_logprobs.shape == other.top_logprobs.shape
            stored, expected_top = one.top_logprobs.read(), other.top_logprobs.read()
            for name in ("token_idx", "token_id", "logprobs"):
                ours, theirs = getattr(stored, name), getattr(expected_top, name)
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)


def test_conversations_come_back_as_they_were_written(tmp_path, rng):
    written = [random_conversation(rng, index) for index in range(7)]
    write_shard(tmp_path / "shard.parquet", written)
    for found, expected in zip(read_shard(tmp_path / "shard.parquet"), written, strict=True):
        assert_same(found, expected)


def test_log_probabilities_stay_in_the_file_until_they_are_asked_for(tmp_path, rng):
    path = tmp_path / "shard.parquet"
    written = [random_conversation(rng, index) for index in range(4)]
    write_shard(path, written)
    found = [conversation.messages[1].top_logprobs for conversation in read_shard(path)]
    assert [top.shape for top in found] == [conversation.messages[1].top_logprobs.shape for conversation in written]
    np.testing.assert_array_equal(found[2].read().logprobs, written[2].messages[1].top_logprobs.logprobs)
    path.unlink()
    with pytest.raises(UserError, match="shard.parquet"):
        found[3].read()


def test_a_disk_that_fails_for_a_while_does_not_condemn_the_shard(tmp_path, rng):
    path = tmp_path / "shard.parquet"
    write_shard(path, [random_conversation(rng, 0)])
    (found,) = read_shard(path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(PassingFailure, match="cannot be read now") as caught:
        found.messages[1].top_logprobs.read()
    assert "delete" not in str(caught.value) and caught.value.exit_code == 75


def test_a_file_that_was_written_anew_is_read_anew(tmp_path, rng):
    path = tmp_path / "shard.parquet"
    for _ in range(2):
        (written,) = conversations = [random_conversation(rng, 0)]
        write_shard(path, conversations)
        os.utime(path, ns=(0, 0))  # within one tick of the file system's clock
        (found,) = read_shard(path)
        assert_same(found, written)


def test_entries_of_rows_that_share_a_group_are_found(tmp_path, rng):
    path = tmp_path / "shard.parquet"
    written = [random_conversation(rng, index) for index in range(7)]
    write_shard(path, written)
    pq.write_table(pq.read_table(path), path, row_group_size=3)
    for index in rng.permutation(7):
        assert_same(read_shard(path)[index], written[index])


def test_a_shard_has_the_mode_that_the_umask_gives(tmp_path, rng):
    path = tmp_path / "shard.parquet"
    before = os.umask(0o027)
    try:
        write_shard(path, [random_conversation(rng, 0)])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_row_group_is_read_once_for_the_conversations_in_it(tmp_path, rng, monkeypatch):
    path, read = tmp_path / "shard.parquet", []
    written = [random_conversation(rng, index) for index in range(8)]
    write_shard(path, written)
    found, read_row_group = read_shard(path), pq.ParquetFile.read_row_group

    def noted(file, group, **columns):
        read.append(group)
        return read_row_group(file, group, **columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    for one, other in zip(found, written):
        assert_same(one, other)
    assert read == [0]


def test_a_shard_of_no_conversations_comes_back_empty(tmp_path):
    write_shard(tmp_path / "empty.parquet", [])
    assert read_shard(tmp_path / "empty.parquet") == []


def test_a_conversation_without_metadata_comes_back(tmp_path):
    conversation = Conversation([Message("user", "hi", [1]), Message("assistant", "ho", [2])], metadata={})
    write_shard(tmp_path / "bare.parquet", [conversation])
    assert_same(read_shard(tmp_path / "bare.parquet")[0], conversation)


def test_dense_targets_have_the_entries_of_their_token_and_padding_behind(rng):
    top = TopLogprobs(
        token_idx=np.array([0, 0, 2, 3, 3, 3], np.int32),
        token_id=np.array([10, 11, 12, 13, 14, 15], np.int32),
        logprobs=np.array([-0.5, -1, -0.1, -1, -2, -3], np.float32),
        shape=(5, 3),
    )
    ids, logprobs = top.dense()
    inf = -np.inf
    np.testing.assert_array_equal(
        logprobs, np.array([[-0.5, -1, inf], [inf] * 3, [-0.1, inf, inf], [-1, -2, -3], [inf] * 3], np.float32)
    )
    stored = np.isfinite(logprobs)
    assert ids[stored].tolist() == [10, 11, 12, 13, 14, 15]
    shuffled = rng.permutation(6)
    other = TopLogprobs(top.token_idx[shuffled], top.token_id[shuffled], top.logprobs[shuffled], top.shape)
    for row in range(5):
        pairs = [set(zip(i[row], lp[row])) for i, lp in (top.dense(), other.dense())]
        assert pairs[0] == pairs[1]


def test_dense_and_sparse_are_inverse(rng):
    ids, logprobs = rng.integers(0, 99, (6, 4)).astype(np.int32), -rng.random((6, 4)).astype(np.float32)
    again = TopLogprobs.from_dense(ids, logprobs).dense()
    np.testing.assert_array_equal(again[0], ids)
    np.testing.assert_array_equal(again[1], logprobs)


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.99])
def test_a_truncated_shard_is_named_in_one_line(tmp_path, rng, kept):
    path = tmp_path / "shard-00003.parquet"
    write_shard(path, [random_conversation(rng, index) for index in range(20)])
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(UserError, match="shard-00003.parquet") as caught:
        read_shard(path)
    assert "\n" not in str(caught.value)


def test_damaged_data_pages_are_named(tmp_path, rng):
    path = tmp_path / "shard.parquet"
    write_shard(path, [random_conversation(rng, index) for index in range(50)])
    damaged = bytearray(path.read_bytes())
    damaged[4:400] = bytes(396)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="shard.parquet"):
        read_shard(path)


def test_damage_among_the_log_probabilities_is_named_when_they_are_read(tmp_path, rng):
    path = tmp_path / "shard.parquet"
    write_shard(path, [random_conversation(rng, index) for index in range(17)])
    group = pq.ParquetFile(path).metadata.row_group(2)
    columns = [group.column(number) for number in range(group.num_columns)]
    (column,) = [one for one in columns if ".top_logprobs.logprobs." in one.path_in_schema]
    data, begin = bytearray(path.read_bytes()), column.data_page_offset
    data[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    found = [conversation.messages[1].top_logprobs for conversation in read_shard(path)]
    found[0].read()
    with pytest.raises(UserError, match="shard.parquet"):
        found[-1].read()


def test_a_parquet_file_of_something_else_is_named(tmp_path):
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="other.parquet"):
        read_shard(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="absent.parquet"):
        read_shard(tmp_path / "absent.parquet")


def test_a_write_that_fails_leaves_the_old_shard_and_nothing_else(tmp_path, rng, monkeypatch):
    path = tmp_path / "shard.parquet"
    old = [random_conversation(rng, 1)]
    write_shard(path, old)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(path, [random_conversation(rng, 2)])
    assert os.listdir(tmp_path) == ["shard.parquet"]
    assert_same(read_shard(path)[0], old[0])


def test_a_first_write_that_fails_leaves_no_file(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "shard.parquet", [random_conversation(rng, 0)])
    assert os.listdir(tmp_path) == []


def test_rows_of_the_references_published_schema_load(tmp_path):
    """HazyResearch/cartridges: wider integers, metadata of its own, user turns without log-probabilities."""
    top = pa.struct(
        [
            ("token_idx", pa.large_list(pa.int64())),
            ("token_id", pa.large_list(pa.int64())),
            ("logprobs", pa.large_list(pa.float64())),
            ("shape", pa.list_(pa.int64())),
        ]
    )
    message = pa.struct(
        [("content", pa.string()), ("role", pa.string()), ("token_ids", pa.list_(pa.int64())), ("top_logprobs", top)]
    )
    rows = [
        [
            {"content": "Q?", "role": "user", "token_ids": None, "top_logprobs": None},
            {
                "content": "A.",
                "role": "assistant",
                "token_ids": [32, 13, 128009],
                "top_logprobs": {
                    "token_idx": [0, 0, 2], "token_id": [32, 33, 128009], "logprobs": [-0.1, -2.5, -0.01], "shape": [3, 20],
                },
            },
        ]
    ]  # fmt: skip
    table = pa.table(
        {
            "messages": pa.array(rows, pa.list_(message)),
            "type": pa.array(["todo"]),
            "metadata": pa.array([{"tool_calls": [], "seed_prompt": "Ask."}]),
            "system_prompt": pa.array(["<document/>"]),
        }
    )
    pq.write_table(table, tmp_path / "reference.parquet")
    (found,) = read_shard(tmp_path / "reference.parquet")
    assert [m.role for m in found.messages] == ["user", "assistant"]
    assert found.messages[0].token_ids == [] and found.messages[0].top_logprobs is None
    assert found.metadata["seed_prompt"] == "Ask." and found.system_prompt == "<document/>"
    ids, logprobs = found.messages[1].top_logprobs.dense()
    assert ids.shape == (3, 20) and np.isfinite(logprobs).sum(axis=1).tolist() == [2, 0, 1]
    assert ids[0, :2].tolist() == [32, 33] and ids[2, 0] == 128009


def test_rows_without_any_metadata_column_content_load(tmp_path, rng):
    table = pa.table(
        {
            "messages": pa.array(
                [
                    [
                        {"role": "user", "content": "a", "token_ids": [1]},
                        {"role": "assistant", "content": "b", "token_ids": [2]},
                    ]
                ]
            ),
            "system_prompt": pa.array([None], pa.string()),
            "metadata": pa.array([None], pa.struct([("id", pa.string())])),
            "type": pa.array([None], pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "bare.parquet")
    (found,) = read_shard(tmp_path / "bare.parquet")
    assert (found.metadata, found.system_prompt, found.type) == ({}, "", "")
    assert found.messages[1].token_ids == [2] and found.messages[1].top_logprobs is None
