"""The train step against PyTorch autograd over transformers.

The torch side runs every conversation by itself, unpacked, in float64, behind leaf tensors in
`past_key_values`, with a loss of its own; ours runs packed rows in micro-batches.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers import torch
from targets import log_softmax, random_targets
from tiny import random_prefix, random_tokens, twin_run

from cartridges_jax import sampling
from cartridges_jax.data.examples import Example
from cartridges_jax.data.packing import TrainBatch, plan_packing
from cartridges_jax.distill.learner import CartridgeLearner
from cartridges_jax.distill.step import batch_loss, eval_step, init_state, train_step

P, FROZEN = 6, 1
LEARNER = CartridgeLearner(FROZEN)

# Keeps the accumulated gradients as its state and moves nothing.
RECORDER = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
ADAM = optax.adam(1e-2)


@pytest.fixture
def examples(tiny_pair, rng):
    """Conversations of 8–20 tokens with 2–5 targets each."""
    config = tiny_pair.model.config
    made = []
    for _ in range(12):
        tokens = random_tokens(rng, config, int(rng.integers(8, 20)))
        count = int(rng.integers(2, 6))
        rows = np.sort(rng.choice(len(tokens) - 1, count, replace=False)).astype(np.int32)
        _, ids, logprobs = random_targets(rng, count, config.vocab_size, 4)
        logprobs[rng.random(logprobs.shape) < 0.15] = -np.inf  # some targets store fewer entries
        logprobs[:, 0] = np.maximum(logprobs[:, 0], -10)
        made.append(Example.of(tokens, rows, ids, logprobs))
    return made


def packed(examples, micro_batches):
    """All examples in one step of four rows, two and more to a row."""
    plan = plan_packing(examples, num_steps=1, rows_per_step=4, row_tokens=80, micro_batches=micro_batches, seed=0)
    members = [index for row in plan.steps[0] for index in row]
    batch = plan.batch(0)
    assert all(len(row) >= 2 for row in plan.steps[0])
    return jax.tree.map(jnp.asarray, batch), [examples[index] for index in members]


def torch_loss_and_gradients(pair, prefix, examples, tail):
    """Mean loss over all target tokens and d/d(keys, values), in float64."""
    twin = pair.double()
    keys, values = (torch.from_numpy(np.array(x)).double().requires_grad_() for x in (prefix.keys, prefix.values))
    total, count = 0.0, 0
    for example in examples:
        logits = twin_run(twin, example.tokens, keys=keys, values=values)
        for row, ids, logprobs in zip(example.rows, example.ids, example.logprobs):
            used = np.isfinite(logprobs)
            p = torch.from_numpy(np.exp(logprobs[used].astype(np.float64)))
            q = torch.softmax(logits[row].double(), dim=-1)[torch.from_numpy(ids[used].astype(np.int64))]
            total = total + torch.sum(p * torch.log(p / q))
            if tail == "class":
                total = total + (1 - p.sum()) * torch.log((1 - p.sum()) / (1 - q.sum()))
            count += 1
    loss = total / count
    loss.backward()
    return loss.item(), keys.grad.numpy(), values.grad.numpy()


def trainable_of(prefix):
    return LEARNER.init(None, prefix)[1]


def mask_of(prefix, num_frozen):
    return CartridgeLearner(num_frozen).mask(*LEARNER.init(None, prefix))


def take_step(model, prefix, batch, *, optimizer=RECORDER, state=None, params=None, **settings):
    state = init_state(trainable_of(prefix), optimizer) if state is None else state
    mask = settings.pop("mask", mask_of(prefix, 0))
    return train_step(
        model.config, optimizer, LEARNER, model.params if params is None else params, prefix, mask, state,
        batch, **settings,
    )  # fmt: skip


def agrees(found, expected):
    """1e-4 relative, element by element; elements near zero to 1e-5 of the largest."""
    largest = np.abs(expected).max()
    assert largest > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("tail", ["class", "drop"])
def test_the_gradient_of_a_cartridge_equals_torch_autograd_over_transformers(
    tiny_pair, rng, examples, tail, micro_batches
):
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    batch, members = packed(examples, micro_batches)
    state, metrics = take_step(tiny_pair.model, prefix, batch, tail=tail)
    loss, keys, values = torch_loss_and_gradients(tiny_pair, prefix, members, tail)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
    assert int(metrics["num_targets"]) == sum(len(example.rows) for example in members)
    agrees(state.opt_state["keys"], keys)
    agrees(state.opt_state["values"], values)
    norm = np.sqrt((keys**2).sum() + (values**2).sum())
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_rematerialisation_does_not_change_the_step(tiny_pair, rng, examples):
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    batch, _ = packed(examples, 2)
    plain, _ = take_step(tiny_pair.model, prefix, batch)
    saving, _ = take_step(tiny_pair.model, prefix, batch, remat=True)
    for name in ("keys", "values"):
        agrees(saving.opt_state[name], np.asarray(plain.opt_state[name]))


def test_how_a_step_is_cut_into_micro_batches_does_not_change_the_update(tiny_pair, rng, examples):
    """One denominator: the halves hold different numbers of targets, so a mean of means would differ."""
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    whole, _ = packed(examples, 1)
    # Only two targets of the first half of the rows count.
    in_half = (whole.rows // (2 * 80) == jnp.arange(2)[:, None]) & (whole.weight > 0)
    in_half = in_half.at[0].set(in_half[0] & (jnp.cumsum(in_half[0]) <= 2))
    whole = whole._replace(weight=in_half.any(axis=0, keepdims=True).astype(jnp.float32))
    halves = TrainBatch(
        *(leaf.reshape(2, 2, 80) for leaf in (whole.tokens, whole.positions, whole.segment_ids)),
        rows=jnp.where(in_half, whole.rows - jnp.array([[0], [2 * 80]]), 0),
        ids=jnp.tile(whole.ids, (2, 1, 1)),
        logprobs=jnp.tile(whole.logprobs, (2, 1, 1)),
        weight=in_half.astype(jnp.float32),
    )
    counts = halves.weight.sum(axis=1).tolist()
    assert counts[0] == 2 and counts[1] > 6
    (one, one_metrics), (two, two_metrics) = (take_step(tiny_pair.model, prefix, batch) for batch in (whole, halves))
    assert float(one_metrics["loss"]) == pytest.approx(float(two_metrics["loss"]), rel=1e-5)
    for name in ("keys", "values"):
        agrees(two.opt_state[name], np.asarray(one.opt_state[name]))


def test_padding_targets_and_padding_tokens_count_for_nothing(tiny_pair, rng, examples):
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    # Four of 19 leave 4 of a row's 80 tokens over.
    batch, _ = packed([dataclasses.replace(e, tokens=np.resize(e.tokens, 19)) for e in examples], 1)
    unused = batch.weight == 0
    assert unused.any() and (batch.segment_ids == 0).any()
    other = batch._replace(
        tokens=jnp.where(
            batch.segment_ids == 0, random_tokens(rng, tiny_pair.model.config, *batch.tokens.shape), batch.tokens
        ),
        rows=jnp.where(unused, rng.integers(0, 4 * 80, unused.shape), batch.rows),
        ids=jnp.where(unused[..., None], 7, batch.ids),
    )
    (one, _), (two, _) = (take_step(tiny_pair.model, prefix, case) for case in (batch, other))
    agrees(two.opt_state["keys"], np.asarray(one.opt_state["keys"]))


def test_a_cartridge_in_bfloat16_learns_in_float32(tiny_pair, rng):
    trainable = trainable_of(random_prefix(rng, tiny_pair.model.config, P).astype(jnp.bfloat16))
    state = init_state(trainable, ADAM)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype("float32")}


def bits(leaf):
    return np.asarray(leaf).view(np.uint32)


@pytest.mark.parametrize("optimizer", [ADAM, optax.adamw(1e-2, weight_decay=0.1)], ids=["adam", "adamw"])
def test_frozen_slots_stay_as_they_are_to_the_bit(tiny_pair, rng, examples, optimizer):
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    batch, _ = packed(examples, 2)
    mask = mask_of(prefix, FROZEN)
    assert mask[:, 0].tolist() == [0, 1, 1, 1, 1, 1]
    state = None
    for _ in range(3):
        state, _ = take_step(tiny_pair.model, prefix, batch, optimizer=optimizer, state=state, mask=mask)
    for name, start in (("keys", prefix.keys), ("values", prefix.values)):
        learned = state.trainable[name]
        np.testing.assert_array_equal(bits(learned[:, :, :FROZEN]), bits(start[:, :, :FROZEN]))
        assert (np.asarray(learned[:, :, FROZEN:]) != np.asarray(start[:, :, FROZEN:])).mean() > 0.99


def test_the_recorded_gradient_of_frozen_slots_is_zero_and_of_the_others_unchanged(tiny_pair, rng, examples):
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    batch, _ = packed(examples, 2)
    all_learn, _ = take_step(tiny_pair.model, prefix, batch)
    masked, _ = take_step(tiny_pair.model, prefix, batch, mask=mask_of(prefix, 2))
    assert not np.asarray(masked.opt_state["keys"][:, :, :2]).any()
    agrees(masked.opt_state["keys"][:, :, 2:], np.asarray(all_learn.opt_state["keys"][:, :, 2:]))


def test_training_lowers_the_loss(tiny_pair, rng, examples):
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    batch, _ = packed(examples, 2)
    state, losses = None, []
    for _ in range(12):
        state, metrics = take_step(tiny_pair.model, prefix, batch, optimizer=ADAM, state=state)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 12 and int(state.refused) == 0
    assert losses[-1] < losses[0] - 0.05
    total, count = eval_step(tiny_pair.model.config, LEARNER, tiny_pair.model.params, prefix, state.trainable, batch)
    assert float(total / count) < losses[-1]


@pytest.mark.parametrize("damage", ["nan weights", "infinite weights", "nan target weight"])
def test_a_step_without_a_finite_loss_changes_nothing_but_the_counters(tiny_pair, rng, examples, damage):
    model = tiny_pair.model
    prefix = random_prefix(rng, model.config, P)
    batch, _ = packed(examples, 2)
    mask = mask_of(prefix, FROZEN)
    step = {"optimizer": ADAM, "mask": mask}
    bad_batch, bad_params = batch, model.params
    if damage == "nan target weight":
        bad_batch = batch._replace(weight=batch.weight.at[1, 0].set(jnp.nan))
    else:
        value = jnp.nan if damage == "nan weights" else jnp.inf
        bad_params = {**model.params, "final_norm": model.params["final_norm"].at[3].set(value)}

    state, _ = take_step(model, prefix, batch, **step)
    before = jax.tree.map(np.array, (state.trainable, state.opt_state))
    for count in (1, 2):
        state, metrics = take_step(model, prefix, bad_batch, params=bad_params, state=state, **step)
        assert not np.isfinite(metrics["loss"])
        assert (int(state.step), int(state.refused), int(state.refused_in_a_row)) == (1 + count, count, count)
        jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), before)
    state, metrics = take_step(model, prefix, batch, state=state, **step)
    assert np.isfinite(metrics["loss"])
    assert (int(state.step), int(state.refused), int(state.refused_in_a_row)) == (4, 2, 0)
    assert not np.array_equal(state.trainable["keys"], before[0]["keys"])


def test_evaluation_sums_what_training_averages(tiny_pair, rng, examples):
    model = tiny_pair.model
    prefix = random_prefix(rng, model.config, P)
    batch, members = packed(examples, 2)
    total, count = eval_step(model.config, LEARNER, model.params, prefix, trainable_of(prefix), batch)
    loss, _, _ = torch_loss_and_gradients(tiny_pair, prefix, members, "class")
    assert int(count) == sum(len(example.rows) for example in members)
    assert float(total / count) == pytest.approx(loss, rel=1e-4)
    micro = jax.tree.map(lambda leaf: leaf[0], batch)
    part = batch_loss(model.config, model.params, prefix, micro, tail="class")
    assert 0 < float(part) < float(total)


def test_behind_its_own_document_a_cartridge_has_nothing_to_learn(tiny_pair, rng):
    """Teacher and student are one model with one prefix: the stored targets are met exactly."""
    model = tiny_pair.model
    document = random_tokens(rng, model.config, 30).tolist()
    prefix = sampling.prefill(model, document)
    tokens = random_tokens(rng, model.config, 20)
    teacher = log_softmax(sampling.logits(model, tokens.tolist(), prefix))
    ids = np.argsort(-teacher, axis=-1)[:, :8].astype(np.int32)
    example = Example.of(
        tokens, np.arange(19, dtype=np.int32), ids[:19],
        np.take_along_axis(teacher, ids, axis=-1)[:19].astype(np.float32),
    )  # fmt: skip
    plan = plan_packing([example] * 3, num_steps=1, rows_per_step=2, row_tokens=45, micro_batches=1, seed=0)
    _, metrics = take_step(model, prefix, jax.tree.map(jnp.asarray, plan.batch(0)))
    assert abs(float(metrics["loss"])) < 1e-5 and float(metrics["grad_norm"]) < 1e-3


def test_a_state_holds_its_own_buffers(tiny_pair, rng):
    """The step donates its state; what it was made from must live on."""
    prefix = random_prefix(rng, tiny_pair.model.config, P)
    kept = dataclasses.replace(prefix)
    state = init_state(trainable_of(prefix), ADAM)
    jax.tree.map(lambda leaf: leaf.delete(), state.trainable)
    assert np.isfinite(np.asarray(kept.keys)).all()
