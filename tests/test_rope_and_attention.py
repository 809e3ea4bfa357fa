"""Rotary positions, masks and the attention function against float64 references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch

from cartridges_jax.attention import LayerPrefix, attend, cache_mask, packed_causal_mask
from cartridges_jax.attention.reference import dense_attention
from cartridges_jax.rope import Rope, rope_tables, rotate

B, T, S, P, K, G, H = 2, 7, 9, 5, 2, 3, 8
N = K * G


def normal(rng, *shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def random_case(rng, *, own_slots=S, with_prefix=True, with_bias=True, scale=1.0):
    """(queries, keys, values, prefix); large scales make peaked distributions."""
    prefix = None
    if with_prefix:
        bias = normal(rng, K, P, scale=2.0) if with_bias else None
        prefix = LayerPrefix(normal(rng, K, P, H, scale=scale), normal(rng, K, P, H), bias)
    return (
        normal(rng, B, T, N, H, scale=scale), normal(rng, B, K, own_slots, H), normal(rng, B, K, own_slots, H), prefix
    )  # fmt: skip


def random_mask(rng, own_slots=S):
    mask = rng.random((B, T, own_slots)) < 0.5
    mask[:, :, 0] = True  # no empty rows, as in every mask of the package
    return mask


# Attention


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_attention_equals_one_dense_softmax_in_float64(rng, with_prefix, with_bias):
    queries, keys, values, prefix = random_case(rng, with_prefix=with_prefix, with_bias=with_bias)
    mask = random_mask(rng)
    np.testing.assert_allclose(
        attend(queries, keys, values, mask, prefix),
        dense_attention(queries, keys, values, mask, prefix),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_the_reference_itself_equals_torchs_attention_over_concatenated_keys(rng):
    queries, keys, values, prefix = random_case(rng)
    mask = random_mask(rng)
    tensors = [torch.from_numpy(x).double() for x in (queries, keys, values, *prefix)]
    np.testing.assert_allclose(
        dense_attention(queries, keys, values, mask, prefix), dense_in_torch(*tensors, mask).numpy(), rtol=1e-9
    )


@pytest.mark.parametrize("with_prefix", [False, True])
def test_every_query_head_reads_the_key_head_of_its_group(rng, with_prefix):
    queries, keys, values, prefix = random_case(rng, with_prefix=with_prefix, with_bias=False)
    values = np.zeros_like(values) + np.arange(1, K + 1, dtype=np.float32)[:, None, None]
    if with_prefix:
        prefix = prefix._replace(values=np.zeros_like(prefix.values) + np.arange(1, K + 1)[:, None, None])
    found = attend(queries, keys, values, random_mask(rng), prefix)
    expected = np.repeat(np.arange(1, K + 1), G)[:, None]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-5)


def dense_in_torch(queries, keys, values, prefix_keys, prefix_values, bias, mask, *, prefix_mask=None, softcap=0.0):
    """One softmax over concatenated keys, every key repeated for its group; differentiable."""
    rows = queries.shape[0]
    slots = [x[None].expand(rows, *x.shape) for x in (prefix_keys, prefix_values)]
    all_keys = torch.cat([slots[0], keys], dim=2).repeat_interleave(G, dim=1)
    all_values = torch.cat([slots[1], values], dim=2).repeat_interleave(G, dim=1)
    scores = torch.einsum("btnh,bnsh->bnts", queries, all_keys) / queries.shape[-1] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~torch.from_numpy(np.array(mask)), -torch.inf)
    own = hidden[:, None].expand(-1, N, -1, -1)
    prefix_bias = bias.repeat_interleave(G, dim=0)[None, :, None].expand(rows, -1, queries.shape[1], -1)
    if prefix_mask is not None:
        prefix_bias = prefix_bias.masked_fill(~torch.from_numpy(prefix_mask)[:, None], -torch.inf)
    weights = torch.softmax(scores + torch.cat([prefix_bias, own], dim=-1), dim=-1)
    return torch.einsum("bnts,bnsh->btnh", weights, all_values)


@pytest.mark.parametrize("with_prefix_mask", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_gradients_equal_those_of_one_dense_softmax(rng, scale, softcap, with_prefix_mask):
    queries, keys, values, prefix = random_case(rng, scale=scale)
    mask, upstream = random_mask(rng), normal(rng, B, T, N, H)
    prefix_mask = rng.random((B, T, P)) < 0.6 if with_prefix_mask else None

    def ours(queries, keys, values, *prefix):
        found = attend(queries, keys, values, mask, LayerPrefix(*prefix), prefix_mask=prefix_mask, softcap=softcap)
        return jnp.sum(found * upstream)

    found = jax.grad(ours, argnums=range(6))(queries, keys, values, *prefix)

    leaves = [torch.from_numpy(x).double().requires_grad_() for x in (queries, keys, values, *prefix)]
    (
        dense_in_torch(*leaves, mask, prefix_mask=prefix_mask, softcap=softcap) * torch.from_numpy(upstream)
    ).sum().backward()
    names = ("queries", "keys", "values", "prefix keys", "prefix values", "bias")
    for name, ours_grad, leaf in zip(names, found, leaves, strict=True):
        expected = leaf.grad.numpy()
        assert np.abs(expected).max() > 1e-3, name
        np.testing.assert_allclose(
            ours_grad, expected, rtol=1e-4, atol=2e-6 * np.abs(expected).max() * scale, err_msg=name
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["prefix", "own"])
def test_a_peaked_cache_gives_finite_values_and_gradients(rng, dtype, where):
    queries, keys, values, prefix = random_case(rng)
    if where == "prefix":
        prefix = prefix._replace(keys=prefix.keys * 300)
    else:
        keys = keys * 300
    mask = packed_causal_mask(jnp.ones((B, T), jnp.int32))
    keys, values = keys[:, :, :T], values[:, :, :T]
    cast = [jnp.asarray(x, dtype) for x in (queries * 10, keys, values, prefix.keys, prefix.values)]

    def total(queries, keys, values, prefix_keys, prefix_values, bias):
        found = attend(queries, keys, values, mask, LayerPrefix(prefix_keys, prefix_values, bias))
        return found.astype(jnp.float32).sum(), found

    gradients, found = jax.grad(total, argnums=range(6), has_aux=True)(*cast, jnp.asarray(prefix.bias))
    assert found.dtype == dtype
    assert np.isfinite(np.asarray(found, np.float32)).all()
    assert all(np.isfinite(np.asarray(gradient, np.float32)).all() for gradient in gradients)
    # A softmax mixes values, so it cannot leave their range.
    largest = max(np.abs(values).max(), np.abs(prefix.values).max())
    assert np.abs(np.asarray(found, np.float32)).max() <= largest * 1.02


def test_bfloat16_is_close_to_float64(rng):
    queries, keys, values, prefix = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_case(rng))
    mask = random_mask(rng)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (queries, keys, values, mask, prefix))
    found = np.asarray(attend(queries, keys, values, mask, prefix), np.float64)
    assert np.abs(found - dense_attention(*wide[:3], mask, wide[4])).max() < 0.05


# Masks


def test_a_packed_token_sees_its_own_segment_up_to_itself(rng):
    segment_ids = np.sort(rng.integers(0, 4, (3, 12)), axis=1)[:, ::-1].copy()
    found = np.asarray(packed_causal_mask(jnp.asarray(segment_ids)))
    for b in range(3):
        for query in range(12):
            for key in range(12):
                expected = key <= query and segment_ids[b, key] == segment_ids[b, query]
                assert found[b, query, key] == expected, (b, query, key)


def test_a_cached_token_sees_the_slots_filled_before_it_and_its_own(rng):
    lengths = rng.integers(0, 6, 4)
    found = np.asarray(cache_mask(jnp.asarray(lengths), 3, 10))
    for b in range(4):
        for t in range(3):
            np.testing.assert_array_equal(found[b, t], [slot <= lengths[b] + t for slot in range(10)])


def test_packed_segments_attend_as_each_does_alone(rng):
    queries, keys, values, prefix = random_case(rng, own_slots=T)
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 3, 3]])
    packed = np.asarray(attend(queries, keys, values, packed_causal_mask(segment_ids), prefix))
    for b, start, stop in [(0, 0, 3), (0, 3, 5), (1, 0, 1), (1, 1, 5), (1, 5, 7)]:
        own = slice(start, stop)
        causal = np.tril(np.ones((1, stop - start, stop - start), bool))
        alone = dense_attention(
            queries[b : b + 1, own], keys[b : b + 1, :, own], values[b : b + 1, :, own], causal, prefix
        )
        np.testing.assert_allclose(packed[b : b + 1, own], alone, rtol=1e-4, atol=1e-5)


# Rotary positions


def test_rotation_turns_each_pair_of_halves_by_position_times_frequency(rng):
    base, positions = 730.0, rng.integers(0, 4000, (2, 5))
    x = normal(rng, 2, 5, 3, H)
    found = np.asarray(rotate(jnp.asarray(x), *rope_tables(jnp.asarray(positions, jnp.int32), H, Rope(base))))
    pairs = x[..., : H // 2].astype(np.complex128) + 1j * x[..., H // 2 :]
    angle = positions[:, :, None, None] * base ** (-np.arange(H // 2) * 2 / H)
    rotated = pairs * np.exp(1j * angle)
    # float32 angles: 4000 radians are known to about 2e-4.
    np.testing.assert_allclose(found, np.concatenate([rotated.real, rotated.imag], axis=-1), atol=3e-3)


def test_scores_depend_on_the_distance_of_two_positions_only(rng):
    queries, keys = normal(rng, 1, 1, 1, H), normal(rng, 1, 1, 1, H)

    def score(query_position, key_position):
        rotated = [
            rotate(jnp.asarray(x), *rope_tables(jnp.asarray([[at]], jnp.int32), H, Rope(730.0)))
            for x, at in ((queries, query_position), (keys, key_position))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(57, 40) == pytest.approx(score(17, 0), abs=1e-4)
    assert score(57, 40) != pytest.approx(score(40, 57), abs=1e-4)


def test_rotation_keeps_the_dtype_and_computes_in_float32(rng):
    x = jnp.asarray(normal(rng, 1, 4, 2, H), jnp.bfloat16)
    tables = rope_tables(jnp.asarray([[0, 100, 1000, 1001]], jnp.int32), H, Rope(730.0))
    rotated = rotate(x, *tables)
    assert rotated.dtype == jnp.bfloat16 and tables[0].dtype == jnp.float32
    exact = rotate(x.astype(jnp.float32), *tables)
    np.testing.assert_array_equal(np.asarray(rotated, np.float32), np.asarray(exact.astype(jnp.bfloat16), np.float32))
