"""The streamed loss against the full computation in float64, and what a step holds in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.packing import TrainBatch
from cartridges_jax.distill.learner import CartridgeLearner
from cartridges_jax.distill.loss import block_size, divergence_per_token
from cartridges_jax.distill.step import init_state, train_step
from cartridges_jax.models import ModelConfig
from cartridges_jax.models.config import LayerKind
from cartridges_jax.models.decoder import abstract_params
from cartridges_jax.quantized import Narrow, Quantized, channel_scale
from cartridges_jax.rope import Rope

M, D, V, K = 23, 12, 301, 6


def full_computation(hidden, head, ids, logprobs, tail, softcap):
    """Divergences [M] and their gradients [M, D] in float64, from all logits at once."""
    hidden, head, logprobs = (np.asarray(x, np.float64) for x in (hidden, head, logprobs))
    raw = hidden @ head.T
    logits = softcap * np.tanh(raw / softcap) if softcap else raw
    log_student = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    student = np.exp(log_student)
    divergences, slopes = np.zeros(len(hidden)), np.zeros_like(logits)
    for m in range(len(hidden)):
        used = np.isfinite(logprobs[m])
        chosen, p = np.asarray(ids)[m][used], np.exp(logprobs[m][used])
        others = np.ones(logits.shape[1], bool)
        others[chosen] = False
        remaining, student_rest = 1 - p.sum(), student[m][others].sum()
        if tail == "drop" or remaining < 1e-6:
            remaining = 0.0
        divergences[m] = np.sum(p * (np.log(p) - log_student[m][chosen]))
        slopes[m] = (p.sum() + remaining) * student[m]
        slopes[m][chosen] -= p
        if remaining:
            divergences[m] += remaining * np.log(remaining / student_rest)
            slopes[m][others] -= remaining * student[m][others] / student_rest
    if softcap:
        slopes *= 1 - np.tanh(raw / softcap) ** 2
    return divergences, slopes @ head


@pytest.fixture
def case(rng):
    """(hidden, head, ids, logprobs, weight): rows of full, partial and certain teachers, and padding."""
    hidden = rng.standard_normal((M, D)).astype(np.float32)
    head = rng.standard_normal((V, D)).astype(np.float32)
    ids = np.stack([1 + rng.choice(V - 2, K, replace=False) for _ in range(M)]).astype(np.int32)
    ids[0, :2] = 0, V - 1  # the vocabulary's ends
    logprobs = np.log(rng.dirichlet(np.ones(K + 1), M)[:, :K]).astype(np.float32)
    logprobs[rng.random(logprobs.shape) < 0.2] = -np.inf
    logprobs[1] = np.log(np.full(K, 1 / K))  # nothing remains
    logprobs[2] = -np.inf  # a padding row
    weight = (rng.random(M) < 0.7).astype(np.float32)
    return *(jnp.asarray(x) for x in (hidden, head, ids, logprobs)), weight


def weighted(hidden, head, ids, logprobs, weight, tail="class", **settings):
    return jnp.sum(divergence_per_token(hidden, head, ids, logprobs, tail, **settings) * weight)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("tail", ["class", "drop"])
@pytest.mark.parametrize("block", [7, 64, None], ids=str)
def test_value_and_gradient_equal_those_of_all_logits_in_float64(case, tail, softcap, block):
    hidden, head, ids, logprobs, weight = case
    divergences, slopes = full_computation(hidden, head, ids, logprobs, tail, softcap)
    found = divergence_per_token(hidden, head, ids, logprobs, tail, softcap=softcap, block=block)
    np.testing.assert_allclose(found, divergences, rtol=1e-4, atol=1e-5)
    total, gradient = jax.jit(jax.value_and_grad(weighted), static_argnames=("tail", "softcap", "block"))(
        hidden, head, ids, logprobs, weight, tail=tail, softcap=softcap, block=block
    )
    assert float(total) == pytest.approx(divergences @ weight, rel=1e-4)
    np.testing.assert_allclose(gradient, slopes * weight[:, None], rtol=1e-3, atol=2e-5)
    assert not np.asarray(gradient)[np.asarray(weight) == 0].any()


def test_a_quantised_head_counts_as_the_matrix_it_stands_for(case):
    hidden, head, ids, logprobs, weight = case
    scale = channel_scale(np.asarray(head))
    head = Quantized(jnp.asarray(np.round(np.asarray(head) / scale[:, None]), jnp.int8), jnp.asarray(scale))
    wide = np.asarray(head.values, np.float64) * scale[:, None]
    divergences, slopes = full_computation(hidden, wide, ids, logprobs, "class", 5.0)
    total, gradient = jax.value_and_grad(weighted)(hidden, head, ids, logprobs, weight, softcap=5.0, block=64)
    assert float(total) == pytest.approx(divergences @ weight, rel=1e-4)
    np.testing.assert_allclose(gradient, slopes * weight[:, None], rtol=1e-3, atol=2e-5)


def test_a_narrow_head_counts_as_the_matrix_it_stands_for(case):
    hidden, head, ids, logprobs, weight = case
    narrow = jnp.asarray(head, jnp.bfloat16)
    # So that rounding the hidden states for the product changes nothing.
    hidden = jnp.asarray(hidden, jnp.bfloat16).astype(jnp.float32)
    head = Narrow(jax.lax.bitcast_convert_type(narrow, jnp.uint16))
    divergences, slopes = full_computation(hidden, np.asarray(narrow, np.float64), ids, logprobs, "class", 5.0)
    total, gradient = jax.value_and_grad(weighted)(hidden, head, ids, logprobs, weight, softcap=5.0, block=64)
    assert float(total) == pytest.approx(divergences @ weight, rel=1e-4)
    expected = slopes * weight[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("tail", ["class", "drop"])
def test_a_bfloat16_model_has_its_logits_summed_in_float32(case, tail):
    hidden, head, ids, logprobs, weight = case
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
    divergences, slopes = full_computation(*(np.asarray(x, np.float64) for x in narrow), ids, logprobs, tail, 0.0)
    found = divergence_per_token(*narrow, ids, logprobs, tail, block=64)
    assert found.dtype == jnp.float32
    # Products of two bfloat16 are exact in float32; only their sum is rounded.
    np.testing.assert_allclose(found, divergences, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(weighted)(*narrow, ids, logprobs, weight, tail, block=64)
    assert gradient.dtype == jnp.bfloat16
    expected = slopes * weight[:, None]
    np.testing.assert_allclose(
        np.asarray(gradient, np.float32), expected, rtol=0.02, atol=0.01 * np.abs(expected).max()
    )


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_peaked_logits_that_rise_from_block_to_block_stay_exact(rng, case, scale):
    """The running maximum moves far: what was summed before it must fade and nothing overflow."""
    hidden, head, ids, logprobs, weight = case
    head = head * np.linspace(0.01, 1, V, dtype=np.float32)[:, None] * scale / 10
    divergences, slopes = full_computation(hidden, head, ids, logprobs, "drop", 0.0)
    total, gradient = jax.value_and_grad(weighted)(hidden, head, ids, logprobs, weight, "drop", block=16)
    assert float(total) == pytest.approx(divergences @ weight, rel=1e-4)
    np.testing.assert_allclose(gradient, slopes * weight[:, None], rtol=1e-3, atol=1e-4 * np.abs(slopes).max())


def test_the_head_has_no_gradient_and_asking_for_it_says_so(case):
    hidden, head, ids, logprobs, weight = case
    with pytest.raises(ValueError, match="LM head"):
        jax.grad(weighted, argnums=1)(hidden, head, ids, logprobs, weight)


@pytest.mark.parametrize("vocab_size", [1, 100, 32_064, 49_152, 128_256, 262_144])
@pytest.mark.parametrize("num_rows", [0, 1, 320, 32_768])
def test_blocks_are_nearly_equal(vocab_size, num_rows):
    block = block_size(vocab_size, num_rows)
    assert 1 <= block <= min(vocab_size, 8192) and (block % 128 == 0 or block == vocab_size)
    num_blocks = -(-vocab_size // block)
    assert num_blocks * block - vocab_size < 128 * num_blocks


def step_memory(vocab_size):
    """(temporary bytes of a compiled step over 512 targets, bytes of its head)."""
    d_model, num_layers, slots, rows, tokens, targets, k = 64, 2, 8, 4, 128, 512, 20
    config = ModelConfig(
        num_layers=num_layers, d_model=d_model, num_heads=2, num_kv_heads=1, head_dim=32, d_ff=128,
        vocab_size=vocab_size, context_length=512, norm_eps=1e-5, tie_embeddings=True, period=(LayerKind(Rope(1e4)),),
    )  # fmt: skip
    slot = jax.ShapeDtypeStruct((num_layers, 1, slots, 32), jnp.float32)
    number = jax.ShapeDtypeStruct((slots,), jnp.int32)
    prefix = KVPrefix(keys=slot, values=slot, positions=number, next_position=jax.ShapeDtypeStruct((), jnp.int32))
    optimizer = optax.adam(1e-2)
    learner = CartridgeLearner()
    state = jax.eval_shape(lambda start: init_state(learner.init(None, start)[1], optimizer), prefix)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    token, batch = array(jnp.int32, rows, tokens), array(jnp.int32, targets)
    entry = array(jnp.float32, targets, k)
    batch = TrainBatch(token, token, token, batch, array(jnp.int32, targets, k), entry, array(jnp.float32, targets))
    compiled = train_step.lower(
        config, optimizer, learner, abstract_params(config), prefix,
        jax.ShapeDtypeStruct((slots, 1), jnp.float32), state, batch,
    ).compile()  # fmt: skip
    return compiled.memory_analysis().temp_size_in_bytes, vocab_size * d_model * 4


def test_a_steps_memory_does_not_grow_with_the_vocabulary():
    (small, small_head), (large, large_head) = step_memory(32_064), step_memory(128_256)
    print(
        f"step {small / 2**20:.2f} -> {large / 2**20:.2f} MiB, head {small_head / 2**20:.2f} -> {large_head / 2**20:.2f} MiB"
    )
    assert small > 0
    # Whatever a backend may copy of the head; the logits would be 188 MiB.
    assert large - small <= 1.1 * (large_head - small_head)
    assert large <= 1.1 * small + 0.1 * large_head
