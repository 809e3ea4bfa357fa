"""The distillation loss against KL in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import log_softmax, random_targets

from cartridges_jax.distill import loss


def divergence_per_token(logits, ids, logprobs, tail="class"):
    """The package's loss with the identity as the head: as a function of the logits."""
    return loss.divergence_per_token(logits, jnp.eye(logits.shape[1]), ids, logprobs, tail, block=16)


def kl(p, q):
    """KL of explicit distributions over the last axis."""
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


@pytest.mark.parametrize("scale", [0.1, 2.0, 5.0])
def test_the_class_loss_is_the_kl_of_the_coarsened_distributions(rng, scale):
    teacher, ids, logprobs = random_targets(rng, 12, 50, 5, scale)
    logits = (scale * rng.standard_normal((12, 50))).astype(np.float32)

    def coarse(full):
        kept = np.take_along_axis(full, ids, axis=-1)
        rest = [[sum(p for i, p in enumerate(row) if i not in set(chosen))] for row, chosen in zip(full, ids)]
        return np.concatenate([kept, rest], axis=-1)

    expected = kl(coarse(np.exp(teacher)), coarse(np.exp(log_softmax(logits))))
    found = divergence_per_token(jnp.asarray(logits), ids, logprobs, "class")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)


def test_with_all_but_one_token_stored_it_is_the_full_kl(rng):
    teacher, ids, logprobs = random_targets(rng, 8, 20, 19, scale=1.0)
    logits = rng.standard_normal((8, 20)).astype(np.float32)
    expected = kl(np.exp(teacher), np.exp(log_softmax(logits)))
    np.testing.assert_allclose(divergence_per_token(jnp.asarray(logits), ids, logprobs), expected, rtol=1e-3, atol=1e-5)


def test_the_dropped_tail_is_the_plain_sum_over_the_stored_tokens(rng):
    _, ids, logprobs = random_targets(rng, 12, 50, 5)
    logits = (2 * rng.standard_normal((12, 50))).astype(np.float32)
    student = np.take_along_axis(log_softmax(logits), ids, axis=-1)
    expected = np.sum(np.exp(logprobs.astype(np.float64)) * (logprobs - student), axis=-1)
    found = divergence_per_token(jnp.asarray(logits), ids, logprobs, "drop")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["class", "drop"])
def test_the_divergence_from_oneself_is_zero_and_so_is_its_gradient_in_the_class_form(rng, tail):
    logits = jnp.asarray(2 * rng.standard_normal((9, 40)), jnp.float32)
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 6)
    assert np.abs(divergence_per_token(logits, ids, logprobs, tail)).max() < 1e-5
    gradient = jax.grad(lambda x: divergence_per_token(x, ids, logprobs, tail).sum())(logits)
    largest = np.abs(gradient).max()
    assert largest < 1e-5 if tail == "class" else largest > 1e-3


def test_unused_entries_count_for_nothing_whatever_id_they_hold(rng):
    _, ids, logprobs = random_targets(rng, 10, 50, 4)
    logits = jnp.asarray(rng.standard_normal((10, 50)), jnp.float32)
    padding = rng.integers(0, 50, (10, 3)).astype(np.int32)
    padded = np.concatenate([ids, padding], axis=1), np.pad(logprobs, ((0, 0), (0, 3)), constant_values=-np.inf)

    def total(x, tail, targets):
        return divergence_per_token(x, *targets, tail).sum()

    for tail in ("class", "drop"):
        for found, expected in zip(
            jax.value_and_grad(total)(logits, tail, padded), jax.value_and_grad(total)(logits, tail, (ids, logprobs))
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_every_entry_of_a_row_of_high_entropy_draws_the_student(rng):
    """No cut-off by mass: twenty entries that hold 2 % of the mass together all have a gradient."""
    _, ids, logprobs = random_targets(rng, 3, 1000, 20, scale=0.01)
    assert np.exp(logprobs).sum(axis=-1).max() < 0.025
    logits = jnp.asarray(0.1 * rng.standard_normal((3, 1000)), jnp.float32)
    for tail in ("class", "drop"):
        gradient = jax.grad(lambda x, tail=tail: divergence_per_token(x, ids, logprobs, tail).sum())(logits)
        student = np.exp(log_softmax(logits))
        stored = np.take_along_axis(np.asarray(gradient, np.float64), ids, axis=-1)
        teacher = np.exp(logprobs.astype(np.float64))
        q = np.take_along_axis(student, ids, axis=-1)
        if tail == "drop":  # d/dx of -sum_i p_i log q_i
            expected = q * teacher.sum(-1, keepdims=True) - teacher
        else:  # … and of -(1 - sum p) log(1 - sum q)
            rest = (1 - teacher.sum(-1, keepdims=True)) / (1 - q.sum(-1, keepdims=True))
            expected = q * teacher.sum(-1, keepdims=True) - teacher + rest * q * (1 - q.sum(-1, keepdims=True))
        np.testing.assert_allclose(stored, expected, rtol=1e-2, atol=1e-6)


def test_a_confident_student_and_a_confident_teacher_give_finite_losses_and_gradients():
    ids = np.array([[3, 7]], np.int32)
    sure, unsure = np.zeros((1, 20), np.float32), np.zeros((1, 20), np.float32)
    sure[0, 3] = 80.0
    certain = np.array([[0.0, -80.0]], np.float32)
    doubtful = np.log(np.array([[0.5, 0.2]], np.float32))
    for logits in (sure, unsure):
        for logprobs in (certain, doubtful):
            for tail in ("class", "drop"):
                value, gradient = jax.value_and_grad(
                    lambda x, logprobs=logprobs, tail=tail: divergence_per_token(x, ids, logprobs, tail).sum()
                )(jnp.asarray(logits))
                assert np.isfinite(value) and np.isfinite(gradient).all()


def test_an_unknown_tail_is_refused():
    with pytest.raises(ValueError, match="renormalise"):
        divergence_per_token(jnp.zeros((1, 4)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)), "renormalise")
