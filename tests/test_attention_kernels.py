"""The TPU kernels in Pallas' interpreter, against one dense softmax in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from cartridges_jax.attention import (
    LayerPrefix,
    PackedRows,
    attention_implementation,
    packed_causal_mask,
    packed_view,
    prefix_mask,
    tpu,
    tpu_blocks,
)  # fmt: skip
from cartridges_jax.attention.reference import dense_attention
from cartridges_jax.cartridge import from_plain_tokens
from cartridges_jax.errors import UserError
from cartridges_jax.models.config import LayerKind
from cartridges_jax.models.decoder import Decoder
from cartridges_jax.rope import Rope

BLOCK = 128
NAMES = ("queries", "keys", "values", "prefix keys", "prefix values", "bias")


class Case(NamedTuple):
    """Sizes of an input; T and P are no multiples of a block."""

    H: int
    N: int
    K: int
    P: int
    B: int = 2
    T: int = 200
    bias: bool = True
    window: int = 0
    windows_see_prefix: bool = True
    softcap: float = 0.0
    dtype: str = "float32"


CASES = {
    "width 64, three heads a group": Case(64, 6, 2, 150),
    "width 128, a head for each": Case(128, 2, 2, 300, bias=False),
    "width 256, one key head, fewer slots than a block": Case(256, 2, 1, 5),
    "bfloat16": Case(128, 4, 2, 150, dtype="bfloat16"),
    "no prefix": Case(64, 2, 1, 0, B=1),
    "a window that moves past the prefix": Case(64, 2, 1, 150, window=70),
    "a window that the prefix is exempt from": Case(64, 2, 1, 150, window=70, windows_see_prefix=False),
    "capped scores": Case(64, 4, 2, 150, softcap=2.0),
    "rows that fill their blocks": Case(64, 2, 1, 256, T=256),
}  # fmt: skip


class Inputs(NamedTuple):
    """Arrays of a case: what is learned from, and where they stand."""

    leaves: tuple[jax.Array, ...]
    segment_ids: jax.Array
    positions: jax.Array
    prefix_positions: jax.Array | None


def random_inputs(rng, case: Case) -> Inputs:
    """Every row its own lengths: several segments, then padding."""
    B, T, P = case.B, case.T, case.P
    segment_ids, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        ends = np.sort(rng.choice(np.arange(1, T), 3, replace=False))
        for number, (start, stop) in enumerate(zip([0, *ends[:-1]], ends)):
            segment_ids[b, start:stop] = number + 1
            positions[b, start:stop] = P + np.arange(stop - start)
    shapes = [(B, T, case.N, case.H), (B, case.K, T, case.H), (B, case.K, T, case.H)]
    if P:
        shapes += [(case.K, P, case.H), (case.K, P, case.H)]
    leaves = [jnp.asarray(rng.standard_normal(shape) * 1.5, case.dtype) for shape in shapes]
    if P and case.bias:
        leaves.append(jnp.asarray(rng.standard_normal((case.K, P)) * 2, jnp.float32))
    seen = jnp.arange(P) if P and case.windows_see_prefix else None
    return Inputs(tuple(leaves), jnp.asarray(segment_ids), jnp.asarray(positions), seen)


def by_kernels(case: Case, inputs: Inputs, *leaves):
    queries, keys, values, *prefix = leaves
    rows = PackedRows(inputs.segment_ids, inputs.positions, inputs.prefix_positions, case.window)
    scaled = (queries * case.H**-0.5).astype(queries.dtype)
    return tpu.attend_packed(
        scaled, keys, values, rows, LayerPrefix(*prefix) if prefix else None,
        softcap=case.softcap, interpret=True, max_block=BLOCK,
    )  # fmt: skip


def masks(case: Case, inputs: Inputs):
    own = packed_causal_mask(inputs.segment_ids, inputs.positions, case.window)
    if inputs.prefix_positions is None or not case.window:
        return own, np.ones((case.B, case.T, case.P), bool)
    return own, prefix_mask(inputs.positions, inputs.prefix_positions, case.window)


def dense(case: Case, inputs: Inputs, *leaves):
    """One softmax over concatenated keys, every key repeated for its group."""
    queries, keys, values, *prefix = leaves
    mask, prefix_mask = masks(case, inputs)
    bias = jnp.zeros((case.B, case.K, case.T))
    if prefix:
        prefix_keys, prefix_values, prefix_bias = (*prefix, jnp.zeros((case.K, case.P)))[:3]
        repeated = [jnp.broadcast_to(x, (case.B, *x.shape)) for x in (prefix_keys, prefix_values, prefix_bias)]
        keys, values, bias = (jnp.concatenate(pair, axis=2) for pair in zip(repeated, (keys, values, bias)))
    keys, values, bias = (jnp.repeat(x, case.N // case.K, axis=1) for x in (keys, values, bias))
    scores = jnp.einsum("btnh,bnsh->bnts", queries, keys) * case.H**-0.5
    if case.softcap:
        scores = case.softcap * jnp.tanh(scores / case.softcap)
    seen = jnp.concatenate([prefix_mask, mask], axis=-1)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores + bias[:, :, None], -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", weights, values)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_one_dense_softmax(rng, name):
    case = CASES[name]
    inputs = random_inputs(rng, case)
    # Padding has no output that anyone reads, and sends no gradient.
    real = np.asarray(inputs.segment_ids != 0)
    upstream = jnp.asarray(rng.standard_normal(inputs.leaves[0].shape) * real[:, :, None, None], case.dtype)

    @jax.jit
    def ours(*leaves):
        out, backward = jax.vjp(lambda *leaves: by_kernels(case, inputs, *leaves), *leaves)
        return out, backward(upstream)

    found, gradients = ours(*inputs.leaves)
    assert found.dtype == case.dtype and all(g.dtype == x.dtype for g, x in zip(gradients, inputs.leaves))

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in inputs.leaves]
        expected, backward = jax.vjp(lambda *leaves: dense(case, inputs, *leaves), *wide)
        expected_gradients = backward(jnp.asarray(np.asarray(upstream), jnp.float64))
    expected, found = np.asarray(expected)[real], np.asarray(found, np.float64)[real]
    tolerance = 3e-2 if case.dtype == "bfloat16" else 2e-6
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    for leaf, ours_grad, expected_grad in zip(NAMES, gradients, expected_gradients):
        expected_grad = np.asarray(expected_grad)
        assert np.abs(expected_grad).max() > 1e-2, leaf
        error = np.abs(np.asarray(ours_grad, np.float64) - expected_grad).max()
        assert error < tolerance * np.abs(expected_grad).max(), leaf


def test_the_dense_softmax_of_these_tests_is_the_reference(rng):
    case = Case(8, 4, 2, 5, B=2, T=9, window=4, softcap=2.0)
    inputs = random_inputs(rng, case)
    mask, prefix_mask = masks(case, inputs)
    queries, keys, values, *prefix = inputs.leaves
    np.testing.assert_allclose(
        dense(case, inputs, *inputs.leaves),
        dense_attention(queries, keys, values, mask, tuple(prefix), prefix_mask=prefix_mask, softcap=2.0),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_large_scores_stay_exact_and_finite(rng):
    case = Case(64, 2, 1, 150, B=1)
    inputs = random_inputs(rng, case)
    peaked = tuple(x * 100 if name in ("queries", "prefix keys") else x for name, x in zip(NAMES, inputs.leaves))
    found, gradients = jax.jit(
        lambda *leaves: jax.value_and_grad(lambda *leaves: by_kernels(case, inputs, *leaves).sum(), range(6))(*leaves)
    )(*peaked)
    assert np.isfinite(found) and all(np.isfinite(gradient).all() for gradient in gradients)
    found = np.asarray(by_kernels(case, inputs, *peaked))
    largest = max(np.abs(peaked[2]).max(), np.abs(peaked[4]).max())
    assert np.abs(found).max() <= largest * (1 + 1e-5)  # a softmax cannot leave the range of its values


@pytest.mark.parametrize("window", [0, 40, 200])
def test_no_visible_pair_of_tokens_lies_in_a_block_that_is_skipped(rng, window):
    case = Case(64, 1, 1, 0, B=3, T=6 * BLOCK, window=window)
    inputs = random_inputs(rng, case)
    plan = tpu_blocks.Plan(BLOCK, 6, 0, 0, 1, window, 0.0, True)
    found = np.asarray(tpu_blocks.visible_blocks(plan, inputs.segment_ids[:, None])).reshape(3, 6, 6)
    mask = np.array(packed_causal_mask(inputs.segment_ids, inputs.positions, window))
    mask &= np.asarray(inputs.segment_ids != 0)[:, :, None]
    needed = mask.reshape(3, 6, BLOCK, 6, BLOCK).any(axis=(2, 4))
    assert (found.astype(bool) >= needed).all()
    assert not np.triu(found, 1).any()


@pytest.mark.parametrize(("window", "blocks"), [(40, 2), (129, 2), (130, 3)])
def test_blocks_that_the_window_has_passed_are_not_computed(window, blocks):
    plan = tpu_blocks.Plan(BLOCK, 4, 0, 0, 1, window, 0.0, True)
    found = np.asarray(tpu_blocks.visible_blocks(plan, jnp.ones((1, 1, 4 * BLOCK), jnp.int32))).reshape(4, 4)
    np.testing.assert_array_equal(found, np.tril(np.triu(np.ones((4, 4)), 1 - blocks)))


def test_what_packing_leaves_empty_is_not_computed():
    segment_ids = np.repeat([[1, 2, 3, 4]], BLOCK, axis=1)[:, None]
    plan = tpu_blocks.Plan(BLOCK, 4, 0, 0, 1, 0, 0.0, True)
    found = np.asarray(tpu_blocks.visible_blocks(plan, jnp.asarray(segment_ids))).reshape(4, 4)
    np.testing.assert_array_equal(found, np.eye(4))


@pytest.mark.parametrize(
    ("size", "blocks"),
    [(1, (128, 1)), (144, (256, 1)), (512, (512, 1)), (520, (384, 2)), (2048, (512, 4)), (2049, (512, 5))],
)
def test_blocks_are_few_and_waste_less_than_a_lane_row_each(size, blocks):
    assert tpu._even_blocks(size, 512) == blocks


# The choice


def uses_kernels(head_dim=64):
    segment_ids = jnp.ones((1, 8), jnp.int32)
    own, _ = packed_view(segment_ids, jnp.arange(8)[None], None, window=0, head_dim=head_dim)
    return isinstance(own, PackedRows)


def test_kernels_are_chosen_by_the_mesh_in_context_and_by_name():
    assert not uses_kernels()
    for platform, expected in (("tpu", True), ("gpu", False), ("cpu", False)):
        device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)):
            assert uses_kernels() == expected
            with attention_implementation("xla"):
                assert not uses_kernels()
    with attention_implementation("tpu"):
        assert uses_kernels()


def test_head_widths_that_the_kernels_do_not_take_are_left_to_xla():
    with attention_implementation("tpu"):
        assert [width for width in (16, 64, 80, 96, 128, 256) if uses_kernels(width)] == [64, 128, 256]


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(UserError, match="'cudnn'.*auto, xla, tpu, interpret"):
        attention_implementation("cudnn")


def test_a_program_compiled_under_one_choice_is_not_used_under_another():
    traced = []

    @jax.jit
    def program(x):
        traced.append(uses_kernels())
        return x

    program(1.0)
    with attention_implementation("interpret"):
        program(1.0)
    program(1.0)
    assert traced == [False, True]


def test_a_decoder_with_windows_and_a_prefix_computes_and_learns_alike_with_the_kernels(rng):
    kinds = (LayerKind(Rope(730.0), window=6), LayerKind(Rope(9000.0)))
    config = tiny_config(head_dim=64, period=kinds, attention_softcap=5.0)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 12)), jnp.int32)
    segment_ids = jnp.asarray([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3], jnp.int32)
    positions = 9 + jnp.asarray([[*range(7), *range(5)], [*range(9), 0, 0, 0]], jnp.int32)
    params = Decoder(config).init(jax.random.key(int(rng.integers(1 << 30))), tokens, positions, segment_ids)
    shape = (config.num_layers, config.num_kv_heads, 9, config.head_dim)
    slots = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)]

    @jax.jit
    def loss_and_gradient(keys, values):
        def loss(keys, values):
            hidden, _, _ = Decoder(config, remat=True).apply(
                params, tokens, positions, segment_ids, prefix=from_plain_tokens(keys, values)
            )
            return jnp.sum(jnp.sin(hidden) * (segment_ids != 0)[:, :, None])

        return jax.value_and_grad(loss, (0, 1))(keys, values)

    expected = loss_and_gradient(*slots)
    with attention_implementation("interpret"):
        assert "pallas_call" in str(jax.make_jaxpr(loss_and_gradient)(*slots))
        found = loss_and_gradient(*slots)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


# On a mesh


def test_rows_and_heads_on_a_mesh_of_eight_devices_give_the_same_output_and_gradients(rng):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "programs" / "attention_on_a_mesh.py"), str(rng.integers(2**31))],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
