"""Learners: another one is registered and trained by name without a change of the package."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trainer import SETTINGS, task  # noqa: F401
from tiny import random_prefix

from cartridges_jax.distill import learner as learners
from cartridges_jax.distill.learner import CartridgeLearner, make_learner, register
from cartridges_jax.distill.trainer import StopRequested, train
from cartridges_jax.errors import UserError
from cartridges_jax.parallel import make_mesh, partition


@dataclasses.dataclass(frozen=True)
class LowRankDelta:
    """Trains a delta of rank 2 to the values, and a bias of every slot; the keys stay."""

    num_frozen: int

    def init(self, model, prefix):
        L, K, P, H = prefix.values.shape
        rng = np.random.default_rng(0)
        down = jnp.asarray(0.1 * rng.standard_normal((L, K, 2, H)), jnp.float32)
        delta = {"up": jnp.zeros((L, K, P, 2), jnp.float32), "down": down}
        return prefix, {"delta": delta, "bias": jnp.zeros((L, K, P), jnp.float32)}

    def combine(self, params, frozen, trainable):
        delta = trainable["delta"]["up"] @ trainable["delta"]["down"]
        return params, frozen.replace(values=frozen.values + delta, bias=trainable["bias"])

    def mask(self, frozen, trainable):
        learns = (jnp.arange(frozen.num_slots) >= self.num_frozen).astype(jnp.float32)
        return {"delta": {"up": learns[:, None], "down": 1.0}, "bias": learns}

    def axes(self, trainable):
        heads = ("layers", "kv_heads")
        return {"delta": {"up": (*heads, "slots", None), "down": (*heads, None, None)}, "bias": (*heads, "slots")}

    def export(self, frozen, trainable):
        return self.combine(None, frozen, trainable)[1]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(learners, "LEARNERS", dict(learners.LEARNERS))
    register("low-rank")(LowRankDelta)


SETTINGS = dataclasses.replace(SETTINGS, learner="low-rank", steps=6, eval_every=6)


def run(model, task, directory, settings=SETTINGS, **changes):  # noqa: F811
    initial, examples, heldout = task
    chosen = make_learner(settings.learner, num_frozen=1)
    return train(model, initial, examples, heldout, settings, directory, learner=chosen, seed=7, **changes)


def test_a_learner_from_outside_the_package_is_trained_by_name(tiny_model, task, tmp_path):  # noqa: F811
    initial, settings = task[0], dataclasses.replace(SETTINGS, steps=30, eval_every=30, checkpoint_every=30)
    result = run(tiny_model, task, tmp_path, settings)
    losses = [entry["loss"] for entry in result.history["train"]]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:2])
    before, after = (entry["loss"] for entry in result.history["heldout"])
    assert after < before
    np.testing.assert_array_equal(result.prefix.keys, initial.keys)
    moved = np.asarray(result.prefix.values - initial.values)
    assert not moved[:, :, 0].any() and moved[:, :, 1:].any(axis=(0, 1, 3)).all()
    assert (np.linalg.matrix_rank(moved.reshape(-1, *moved.shape[2:]), tol=1e-4) <= 2).all()
    bias = np.asarray(result.prefix.bias)
    assert not bias[:, :, 0].any() and bias[:, :, 1:].any()


def test_another_learner_resumes_to_the_same_bits(tiny_model, task, tmp_path):  # noqa: F811
    expected = run(tiny_model, task, tmp_path / "whole")
    asked = iter([False, False, True])
    with pytest.raises(StopRequested):
        run(tiny_model, task, tmp_path / "stopped", should_stop=lambda: next(asked))
    result = run(tiny_model, task, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, result.prefix, expected.prefix)
    assert result.history == expected.history


def test_the_settings_name_the_learner_and_a_compiled_step_is_looked_up_by_its_value():
    assert make_learner("cartridge", num_frozen=2) == CartridgeLearner(2)
    assert hash(CartridgeLearner(2)) == hash(CartridgeLearner(2)) and CartridgeLearner(1) != CartridgeLearner(2)
    with pytest.raises(UserError, match="train.learner='nothing': choose one of cartridge, low-rank"):
        make_learner("nothing", num_frozen=1)
    with pytest.raises(ValueError, match="'cartridge' is already registered"):
        register("cartridge")(LowRankDelta)


@pytest.mark.parametrize("name", ["cartridge", "low-rank"])
def test_a_learners_parts_fit_together(tiny_model, rng, name):
    """Masks broadcast, axes have rules, and an untrained learner exports its start."""
    start = random_prefix(rng, tiny_model.config, 6)
    learner = make_learner(name, num_frozen=2)
    frozen, trainable = learner.init(tiny_model, start)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    mesh = make_mesh("fsdp:1", jax.devices()[:1])
    axes = learner.axes(trainable)
    jax.tree.map(lambda leaf, names: partition(mesh, names, leaf.shape), trainable, axes)
    mask = learner.mask(frozen, trainable)
    jax.tree.map(
        lambda factor, part: jax.tree.map(lambda leaf: np.broadcast_shapes(np.shape(factor), leaf.shape), part),
        mask, trainable,
    )  # fmt: skip
    exported = learner.export(frozen, trainable)
    np.testing.assert_array_equal(exported.keys, start.keys)
    np.testing.assert_array_equal(exported.values, start.values)
