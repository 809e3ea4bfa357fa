"""Examples to batches: nothing lost, nothing doubled, and a bounded part of the targets in memory."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from cartridges_jax.data.conversations import read_shard, write_shard
from cartridges_jax.data.examples import Example
from cartridges_jax.data.packing import plan_packing
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.errors import UserError


def random_examples(rng, count, longest=40):
    """Every token id occurs once in all examples; the first stored id of a target is the token it predicts."""
    examples, next_id = [], 1
    for _ in range(count):
        size = int(rng.integers(3, longest + 1))
        tokens = np.arange(next_id, next_id + size, dtype=np.int32)
        next_id += size
        targets = int(rng.integers(1, min(size, 9)))
        rows = np.sort(rng.choice(size - 1, targets, replace=False)).astype(np.int32)
        ids = np.stack([tokens[rows + 1], *rng.integers(0, 99, (2, targets))], axis=1).astype(np.int32)
        examples.append(Example.of(tokens, rows, ids, -rng.random((targets, 3)).astype(np.float32)))
    return examples


def plan(examples, *, steps=12, rows=4, row_tokens=64, micro=2, seed=0):
    return plan_packing(
        examples, num_steps=steps, rows_per_step=rows, row_tokens=row_tokens, micro_batches=micro, seed=seed
    )


def segments(batch):
    """(micro-batch, row, tokens, positions) of every segment of a batch."""
    for a, b in np.ndindex(batch.tokens.shape[:2]):
        ids = batch.segment_ids[a, b]
        for segment in range(1, ids.max() + 1):
            yield a, b, batch.tokens[a, b][ids == segment], batch.positions[a, b][ids == segment]


def test_every_example_comes_whole_and_once_an_epoch(rng):
    examples = random_examples(rng, 50)
    found = plan(examples, steps=40)
    seen = [tokens.tolist() for step in range(40) for _, _, tokens, _ in segments(found.batch(step))]
    by_first = {int(example.tokens[0]): example.tokens.tolist() for example in examples}
    assert all(tokens == by_first[tokens[0]] for tokens in seen)
    counts = np.array([sum(tokens[0] == first for tokens in seen) for first in by_first])
    # What waits in the queue for a row that it fits is at most a look-ahead behind.
    assert counts.sum() == pytest.approx(found.epochs * 50)
    assert found.epochs > 5 and counts.max() - counts.min() <= 3


def test_one_step_that_holds_all_examples_holds_each_once_in_the_first_epoch(rng):
    examples = random_examples(rng, 20)
    total = sum(len(example.tokens) for example in examples)
    found = plan(examples, steps=1, rows=2, row_tokens=total, micro=1)
    order = [index for row in found.steps[0] for index in row]
    # Two epochs fit two rows of that length: every example is there once or more, none more than three times.
    assert set(order) == set(range(20)) and max(order.count(index) for index in range(20)) <= 3


def test_an_epoch_is_shuffled_anew(rng):
    examples = random_examples(rng, 30, longest=3)
    order = [
        index for step in plan(examples, steps=30, rows=1, row_tokens=3, micro=1).steps for row in step for index in row
    ]
    again = plan(examples, steps=60, rows=1, row_tokens=3, micro=1).steps
    second = [row[0] for step in again[30:] for row in step]
    assert sorted(order) == sorted(second) == list(range(30))
    assert order != second and order != list(range(30))


def test_positions_restart_with_every_segment(rng):
    found = plan(random_examples(rng, 30))
    for step in range(12):
        for _, _, tokens, positions in segments(found.batch(step)):
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))


def test_segments_lie_side_by_side_and_padding_is_segment_zero_behind_them(rng):
    found = plan(random_examples(rng, 30))
    for step in range(12):
        batch = found.batch(step)
        for row in batch.segment_ids.reshape(-1, 64):
            real = row[row != 0]
            np.testing.assert_array_equal(row[: len(real)], real)
            assert (np.diff(real) >= 0).all() and set(np.diff(real)) <= {0, 1} and real[0] == 1
        assert not batch.tokens[batch.segment_ids == 0].any()


def test_a_target_points_to_the_token_before_the_predicted_one(rng):
    examples = random_examples(rng, 30)
    targets = {int(example.tokens[0]): len(example.rows) for example in examples}
    found = plan(examples)
    for step in range(12):
        batch = found.batch(step)
        for a in range(2):
            tokens, segment_ids = batch.tokens[a].reshape(-1), batch.segment_ids[a].reshape(-1)
            used = batch.weight[a] > 0
            rows = batch.rows[a][used]
            np.testing.assert_array_equal(tokens[rows + 1], batch.ids[a][used][:, 0])
            np.testing.assert_array_equal(segment_ids[rows + 1], segment_ids[rows])
            assert len(set(rows)) == len(rows)
            assert used.sum() == sum(targets[int(t[0])] for m, _, t, _ in segments(batch) if m == a)
            assert set(batch.weight[a]) <= {0.0, 1.0}
            assert np.isneginf(batch.logprobs[a][~used]).all()


def test_logprobs_stay_with_their_target(rng):
    examples = random_examples(rng, 30)
    expected = {int(ids[0]): logprobs for example in examples for ids, logprobs in zip(example.ids, example.logprobs)}
    batch = plan(examples).batch(3)
    for a in range(2):
        for ids, logprobs in zip(batch.ids[a][batch.weight[a] > 0], batch.logprobs[a][batch.weight[a] > 0]):
            np.testing.assert_array_equal(logprobs, expected[int(ids[0])])


def test_all_batches_of_a_plan_have_one_shape_with_room_for_the_fullest(rng):
    found = plan(random_examples(rng, 30), steps=20)
    batches = [found.batch(step) for step in range(20)]
    assert len({tuple(leaf.shape for leaf in batch) for batch in batches}) == 1
    fullest = max(batch.weight[a].sum() for batch in batches for a in range(2))
    assert fullest <= found.num_targets < fullest + 64


def test_a_batch_is_a_function_of_plan_and_step(rng):
    examples = random_examples(rng, 30)
    one, other = plan(examples), plan(examples)
    for step in (7, 0, 7):
        for found, expected in zip(one.batch(step), other.batch(step)):
            np.testing.assert_array_equal(found, expected)
    assert plan(examples, seed=1).steps != one.steps
    # A longer run begins with the shorter one, so a run can be prolonged.
    assert plan(examples, steps=20).steps[:12] == one.steps


def fullest_by_trying_all(sizes, row_tokens):
    """Most tokens that the first item and any of the others have within a row."""
    others = [sizes[0] + sum(chosen) for n in range(len(sizes)) for chosen in itertools.combinations(sizes[1:], n)]
    return max(total for total in others if total <= row_tokens)


def test_a_row_is_filled_as_well_as_what_waits_allows_and_takes_the_first(rng):
    for _ in range(30):
        examples = random_examples(rng, int(rng.integers(1, 9)), longest=30)
        sizes = [len(example.tokens) for example in examples]
        order = [row for step in plan_packing(
            examples, num_steps=None, rows_per_step=1, row_tokens=64, micro_batches=1
        ).steps for row in step]  # fmt: skip
        waiting = list(range(len(examples)))
        for row in order:
            assert row[0] == waiting[0]
            assert sum(sizes[index] for index in row) == fullest_by_trying_all([sizes[i] for i in waiting], 64)
            waiting = [index for index in waiting if index not in row]
        assert not waiting


@pytest.mark.parametrize("steps", [60, 600])
def test_conversations_of_usual_lengths_fill_rows_to_95_percent(steps):
    """Deciles of 519 conversations that SmolLM2 had over one article; three fit a row only in good company.

    Linear programming bounds what whole epochs of them can reach by 0.975.
    """
    deciles = np.array([25, 32, 34, 38, 44, 48, 50, 51, 52, 53, 60])
    sizes = np.interp(np.linspace(0, 10, 519), np.arange(11), deciles).round().astype(int)
    rng = np.random.default_rng(0)
    targets = np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32)
    examples = [Example.of(np.ones(size, np.int32), np.zeros(1, np.int32), *targets) for size in rng.permutation(sizes)]
    found = plan(examples, steps=steps, row_tokens=128)
    assert found.efficiency >= 0.95
    taken = np.bincount([index for step in found.steps for row in step for index in row], minlength=519)
    assert taken.max() - taken.min() <= 2  # nothing waits much longer than the rest


def test_efficiency_is_the_share_of_real_tokens(rng):
    found = plan(random_examples(rng, 60), steps=10)
    real = sum((found.batch(step).segment_ids != 0).sum() for step in range(10))
    assert found.efficiency == pytest.approx(real / (10 * 4 * 64))
    assert found.efficiency > 0.9


def test_an_example_as_long_as_a_row_fits_and_a_longer_one_is_refused(rng):
    examples = random_examples(rng, 5, longest=20)
    long = Example.of(np.arange(64, dtype=np.int32), *(getattr(examples[0], f) for f in ("rows", "ids", "logprobs")))
    assert plan([*examples, long]).num_targets > 0
    with pytest.raises(UserError, match="64 tokens does not fit a row of 63"):
        plan([*examples, long], row_tokens=63)


def test_rows_that_the_micro_batches_do_not_divide_are_refused(rng):
    with pytest.raises(UserError, match="rows_per_step=4 is not divisible by .*micro_batches=3"):
        plan(random_examples(rng, 5), micro=3)
    with pytest.raises(UserError, match="no conversations"):
        plan([])


def test_examples_with_different_numbers_of_stored_entries_share_a_batch(rng):
    """A remote teacher may give 5 entries where another gave 20; padding is -inf."""
    wide = random_examples(rng, 1, longest=10)[0]
    narrow = Example.of(wide.tokens + 1000, wide.rows, wide.ids[:, :1] + 1000, wide.logprobs[:, :1])
    found = plan([wide, narrow], steps=1, rows=2, row_tokens=10, micro=1)
    batch = found.batch(0)
    used = batch.weight[0] > 0
    for ids, logprobs in zip(batch.ids[0][used], batch.logprobs[0][used]):
        assert np.isfinite(logprobs).sum() == (1 if ids[0] >= 1000 else 3)


def test_a_part_of_the_mesh_reads_the_targets_that_it_trains_on_and_no_others(tmp_path, rng):
    conversations = []
    for number in range(12):
        ids = rng.integers(1, 99, (5, 1)).astype(np.int32)
        top = TopLogprobs.from_dense(ids, -rng.random((5, 1)).astype(np.float32))
        messages = [Message("user", "?", [1]), Message("assistant", "!", ids[:, 0].tolist(), top)]
        write_shard(tmp_path / f"{number}.parquet", [Conversation(messages, {"id": number})])
        conversations += read_shard(tmp_path / f"{number}.parquet")
    examples = [
        Example(np.arange(9, dtype=np.int32), np.arange(5, dtype=np.int32), (conversation.messages[1].top_logprobs,))
        for conversation in conversations
    ]
    plan = plan_packing(examples, num_steps=2, rows_per_step=4, row_tokens=10, micro_batches=1, row_parts=2)
    mine = {index for rows in plan.steps for row in rows[:2] for index in row}
    for number in set(range(12)) - mine:
        (tmp_path / f"{number}.parquet").unlink()
    assert 0 < len(mine) < 12
    for step in range(2):
        assert plan.part(step, 0).weight.sum() == 10
    with pytest.raises(UserError, match="parquet is not a readable conversation shard"):
        [plan.part(step, 1) for step in range(2)]


# Memory


def stored_examples(directory, rng, count, per_shard=100, targets=20, k=8):
    """Examples whose targets are in shards; every conversation tells its number in its first target."""
    examples = []
    for first in range(0, count, per_shard):
        conversations = []
        for number in range(first, first + per_shard):
            ids = rng.integers(1, 99, (targets, k)).astype(np.int32)
            ids[0, 0] = number
            top = TopLogprobs.from_dense(ids, -rng.random((targets, k)).astype(np.float32))
            messages = [Message("user", "?", [1]), Message("assistant", "!", ids[:, 0].tolist(), top)]
            conversations.append(Conversation(messages, {"id": number}))
        write_shard(directory / f"{first}.parquet", conversations)
        for conversation in read_shard(directory / f"{first}.parquet"):
            rows = np.arange(targets, dtype=np.int32)
            examples.append(Example(np.ones(targets + 1, np.int32), rows, (conversation.messages[1].top_logprobs,)))
    return examples


def test_an_epoch_over_many_conversations_holds_a_bounded_part_of_their_targets(tmp_path, rng, monkeypatch):
    bytes_of_one, limit = 20 * 8 * 8, 200_000
    monkeypatch.setattr("cartridges_jax.data.packing._TARGETS_BYTES", limit)
    monkeypatch.setattr("cartridges_jax.data.conversations._groups._limit", 100_000)
    examples = stored_examples(tmp_path, rng, 2000)
    found = plan_packing(examples, num_steps=100, rows_per_step=10, row_tokens=42, micro_batches=1)
    assert found.epochs == 1
    seen, held = np.zeros((100, 20), np.int32), np.zeros(100, int)
    tracemalloc.start()
    for step in range(100):
        batch = found.batch(step)
        seen[step] = batch.ids[0, : 20 * 20 : 20, 0]
        held[step] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sorted(seen.reshape(-1)) == list(range(2000))
    assert 0.9 * limit < found.target_cache.nbytes <= limit
    assert len(found.target_cache) == limit // bytes_of_one
    print("bytes held after steps 20, 50 and 100:", held[[19, 49, 99]])
    # The cache is full after 156 of 2000 conversations; keeping all would add another 2.3 MB.
    assert held[20:].max() - held[19] < 0.25 * limit


def test_targets_of_a_small_run_are_read_once(tmp_path, rng):
    examples = stored_examples(tmp_path, rng, 20, per_shard=20)
    found = plan_packing(examples, num_steps=4, rows_per_step=5, row_tokens=42, micro_batches=1)
    first = found.batch(0)
    for step in range(4):
        found.batch(step)
    (tmp_path / "0.parquet").unlink()
    for one, other in zip(first, found.batch(0)):
        np.testing.assert_array_equal(one, other)
