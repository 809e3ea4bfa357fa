"""The training run: what it reaches, what it keeps, and the ways it can end. The model is a tiny one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens

from cartridges_jax import sampling
from cartridges_jax.checkpoint import TrainCheckpoints
from cartridges_jax.data.examples import Example
from cartridges_jax.data.packing import plan_packing
from cartridges_jax.distill.learner import CartridgeLearner
from cartridges_jax.distill.settings import TrainSettings, make_optimizer
from cartridges_jax.distill.step import init_state
from cartridges_jax.distill.trainer import StopRequested, heldout_loss, train
from cartridges_jax.errors import UserError

SETTINGS = TrainSettings(
    steps=6, learning_rate=3e-2, schedule="cosine", warmup_steps=1, final_fraction=0.1, clip_norm=1.0, rows_per_step=2,
    row_tokens=48, micro_batches=1, targets="assistant", tail="class", remat=False, eval_every=2, checkpoint_every=4,
    keep_checkpoints=2, max_refused_in_a_row=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tiny_model):
    """(initial cartridge, examples, held-out examples): what the model predicts after a text of 40 tokens."""
    rng = np.random.default_rng(0)
    text = random_tokens(rng, tiny_model.config, 40).tolist()
    teacher = sampling.prefill(tiny_model, text)
    examples = []
    for _ in range(10):
        tokens = random_tokens(rng, tiny_model.config, 14)
        logits = sampling.logits(tiny_model, tokens.tolist(), teacher).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = np.arange(4, 13, dtype=np.int32)
        ids = np.argsort(-logprobs[rows], axis=-1)[:, :8].astype(np.int32)
        examples.append(Example.of(tokens, rows, ids, np.take_along_axis(logprobs[rows], ids, -1).astype(np.float32)))
    return sampling.prefill(tiny_model, text[:8]), examples[:8], examples[8:]


def damaged(example):
    """Targets whose probability overflows: the loss is not finite."""
    return Example.of(example.tokens, example.rows, example.ids, np.full_like(example.logprobs, 200.0))


def run(model, task, directory, settings=SETTINGS, **changes):
    initial, examples, heldout = task
    values = {"seed": 7} | changes
    return train(
        model, initial, values.pop("examples", examples), values.pop("heldout", heldout), settings, directory, **values
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, task, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return run(tiny_model, task, directory), directory


def steps_on_disk(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


# What it reaches


def test_the_loss_goes_down_on_what_is_trained_and_on_what_is_held_out(tiny_model, task, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=40, eval_every=40, checkpoint_every=40)
    result = run(tiny_model, task, tmp_path, settings)
    losses = [entry["loss"] for entry in result.history["train"]]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:2])
    before, after = (entry["loss"] for entry in result.history["heldout"])
    assert after < before
    assert result.refused == 0 and result.epochs > 1 and 0 < result.packing_efficiency <= 1


def test_every_step_and_every_held_out_loss_is_recorded(uninterrupted):
    history = uninterrupted[0].history
    assert [entry["step"] for entry in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history["heldout"]] == [0, 2, 4, 6]
    assert all(np.isfinite(entry["loss"]) for entries in history.values() for entry in entries)


def test_the_recorded_held_out_loss_is_that_of_the_cartridge_handed_back(tiny_model, task, uninterrupted):
    result = uninterrupted[0]
    plan = plan_packing(task[2], num_steps=None, rows_per_step=1, row_tokens=48, micro_batches=1)
    learner = CartridgeLearner()
    again = heldout_loss(tiny_model, learner, *learner.init(tiny_model, result.prefix), plan, "class")
    assert again == pytest.approx(result.history["heldout"][-1]["loss"], rel=1e-5)
    untrained = heldout_loss(tiny_model, learner, *learner.init(tiny_model, task[0]), plan, "class")
    assert untrained == pytest.approx(result.history["heldout"][0]["loss"], rel=1e-5)


def test_frozen_slots_keep_their_bits_and_all_others_move(task, uninterrupted):
    initial, trained = task[0], uninterrupted[0].prefix
    for before, after in ((initial.keys, trained.keys), (initial.values, trained.values)):
        assert after.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(after)[:, :, :1], np.asarray(before)[:, :, :1])
        assert (np.asarray(after)[:, :, 1:] != np.asarray(before)[:, :, 1:]).any(axis=(0, 1, 3)).all()
    np.testing.assert_array_equal(trained.positions, initial.positions)
    assert trained.next_position == initial.next_position


def test_without_held_out_examples_no_held_out_loss_is_recorded(tiny_model, task, tmp_path):
    result = run(tiny_model, task, tmp_path, dataclasses.replace(SETTINGS, steps=1), heldout=[])
    assert result.history["heldout"] == [] and len(result.history["train"]) == 1


# Interruptions


def test_a_run_that_is_stopped_after_every_step_ends_in_the_same_bits(tiny_model, task, tmp_path, uninterrupted):
    expected = uninterrupted[0]
    for step in range(1, SETTINGS.steps):
        with pytest.raises(StopRequested):
            run(tiny_model, task, tmp_path, should_stop=lambda: True)
        assert steps_on_disk(tmp_path)[-1] == step
    result = run(tiny_model, task, tmp_path, should_stop=lambda: True)
    np.testing.assert_array_equal(result.prefix.keys, expected.prefix.keys)
    np.testing.assert_array_equal(result.prefix.values, expected.prefix.values)
    assert result.history == expected.history
    assert (result.refused, result.epochs) == (expected.refused, expected.epochs)


def test_a_finished_run_gives_its_result_again_without_a_step(tiny_model, task, uninterrupted):
    expected, directory = uninterrupted
    taken = []
    result = run(tiny_model, task, directory, on_step=lambda step, loss: taken.append(loss))
    assert [loss for loss in taken if loss is not None] == []
    np.testing.assert_array_equal(result.prefix.keys, expected.prefix.keys)
    assert result.history == expected.history


def test_only_the_newest_checkpoints_are_kept(tiny_model, task, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=5, checkpoint_every=1, keep_checkpoints=2)
    run(tiny_model, task, tmp_path, settings, heldout=[])
    assert steps_on_disk(tmp_path) == [4, 5]


def test_checkpoints_come_every_so_many_steps_and_at_the_end(uninterrupted):
    assert steps_on_disk(uninterrupted[1]) == [4, 6]


def test_progress_is_told_of_every_step_in_order(tiny_model, task, tmp_path):
    told = []
    settings = dataclasses.replace(SETTINGS, steps=3)
    result = run(tiny_model, task, tmp_path, settings, heldout=[], on_step=lambda *step: told.append(step))
    assert [step for step in told if step[1] is not None] == [
        (entry["step"], entry["loss"]) for entry in result.history["train"]
    ]


# Steps that are refused


def test_a_step_with_a_loss_that_is_not_finite_is_refused_counted_and_passed_over(tiny_model, task, tmp_path):
    examples = [*task[1][:-1], damaged(task[1][-1])]
    settings = dataclasses.replace(SETTINGS, rows_per_step=1, row_tokens=32, max_refused_in_a_row=5)
    plan = plan_packing(examples, num_steps=6, rows_per_step=1, row_tokens=32, micro_batches=1, seed=7)
    bad = [any(7 in row for row in step) for step in plan.steps]
    assert 0 < sum(bad) < 6, "choose another seed"
    result = run(tiny_model, task, tmp_path, settings, examples=examples, heldout=[])
    assert result.refused == sum(bad)
    assert [entry["loss"] is None for entry in result.history["train"]] == bad
    assert np.isfinite(result.prefix.keys).all() and np.isfinite(result.prefix.values).all()
    assert (np.asarray(result.prefix.keys) != np.asarray(task[0].keys)).any()


def restored(model, task, directory, settings):
    checkpoints = TrainCheckpoints(directory, settings.keep_checkpoints)
    state = init_state(CartridgeLearner().init(model, task[0])[1], make_optimizer(settings))
    found, extra = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    checkpoints.close()
    return found, extra


def test_too_many_refused_steps_in_a_row_end_the_run_and_the_last_good_state_is_saved(tiny_model, task, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=20, checkpoint_every=20)
    examples = [damaged(example) for example in task[1]]
    with pytest.raises(UserError, match=r"not finite; lower train.learning_rate=0.03 .*" + str(tmp_path)):
        run(tiny_model, task, tmp_path, settings, examples=examples, heldout=[])
    state, extra = restored(tiny_model, task, tmp_path, settings)
    assert 2 <= int(state.step) <= 3 and int(state.refused) == int(state.step)
    np.testing.assert_array_equal(state.trainable["keys"], np.asarray(task[0].keys))
    assert [entry["loss"] for entry in extra["history"]["train"]] == [None] * int(state.step)


def test_a_run_that_ended_for_its_refused_steps_ends_so_again_when_it_is_started_again(tiny_model, task, tmp_path):
    """Also when they were its last steps."""
    settings = dataclasses.replace(SETTINGS, steps=2)
    examples = [damaged(example) for example in task[1]]
    for _ in range(2):
        with pytest.raises(UserError, match="not finite"):
            run(tiny_model, task, tmp_path, settings, examples=examples, heldout=[])


def test_a_learning_rate_that_destroys_the_cartridge_ends_the_run_in_words(tiny_model, task, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=12, learning_rate=1e38, warmup_steps=0, clip_norm=0.0)
    with pytest.raises(UserError, match="lower train.learning_rate=1e"):
        run(tiny_model, task, tmp_path, settings)


# The rate


def rates(settings):
    """The rate of every step, read off Adam's moves under a constant gradient."""
    optimizer = make_optimizer(settings)
    state = optimizer.init(jnp.zeros(()))
    found = []
    for _ in range(settings.steps):
        update, state = optimizer.update(jnp.float32(3.0), state)
        found.append(-float(update))
    return np.array(found)


def test_the_constant_schedule_warms_up_and_stays():
    settings = dataclasses.replace(SETTINGS, schedule="constant", steps=8, warmup_steps=4, learning_rate=2e-2)
    np.testing.assert_allclose(rates(settings), [0, 5e-3, 1e-2, 1.5e-2, 2e-2, 2e-2, 2e-2, 2e-2], rtol=1e-4)


def test_the_constant_schedule_without_warm_up_is_constant():
    settings = dataclasses.replace(SETTINGS, schedule="constant", steps=3, warmup_steps=0)
    np.testing.assert_allclose(rates(settings), [3e-2] * 3, rtol=1e-4)


def test_the_cosine_schedule_falls_to_its_final_fraction():
    settings = dataclasses.replace(SETTINGS, steps=10, warmup_steps=2, learning_rate=1e-2, final_fraction=0.1)
    progress = np.arange(8) / 8
    cosine = 1e-3 + 9e-3 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(rates(settings), [0, 5e-3, *cosine], rtol=1e-4)


def test_a_gradient_above_the_clip_norm_is_scaled_to_it():
    settings = dataclasses.replace(SETTINGS, clip_norm=0.5)
    state = make_optimizer(settings).init(jnp.zeros(2))
    _, state = make_optimizer(settings).update(jnp.array([3.0, 4.0]), state)
    first_moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,))
    np.testing.assert_allclose(first_moment, 0.1 * np.array([0.3, 0.4]), rtol=1e-5)


def test_steps_that_are_auto_pass_the_check_and_are_refused_by_the_trainer(tiny_model, task, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=0)
    settings.check()
    with pytest.raises(ValueError, match="steps=0 means auto"):
        run(tiny_model, task, tmp_path / "new", settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": -1}, "train.steps=-1"), ({"learner": "nothing"}, "train.learner='nothing': choose one of cartridge"), ({"rows_per_step": 3, "micro_batches": 2}, "not divisible"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"), ({"final_fraction": 1.5}, "final_fraction=1.5"),
        ({"row_tokens": 10}, "raise train.row_tokens"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_written(tiny_model, task, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(tiny_model, task, tmp_path / "new", dataclasses.replace(SETTINGS, **changes))
    assert not (tmp_path / "new").exists()
