"""The KV prefix: composing, slicing and counting its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cartridges_jax import cartridge

L, K, P, H = 3, 2, 5, 4


@pytest.fixture
def rng():
    """Fresh inputs in every run: no behaviour here depends on the values."""
    return np.random.default_rng()


def random_prefix(rng, num_slots=P, *, dtype=jnp.float32, bias=False, layers=L, heads=K, width=H):
    shape = (layers, heads, num_slots, width)
    prefix = cartridge.from_plain_tokens(
        jnp.asarray(rng.standard_normal(shape), dtype), jnp.asarray(rng.standard_normal(shape), dtype)
    )
    if bias:
        prefix = prefix.replace(bias=jnp.asarray(rng.standard_normal(shape[:3]), jnp.float32))
    return prefix


def test_plain_tokens_are_at_their_own_positions(rng):
    prefix = random_prefix(rng)
    np.testing.assert_array_equal(prefix.positions, [0, 1, 2, 3, 4])
    assert (prefix.num_layers, prefix.num_slots, prefix.next_position) == (L, P, P)


def test_composing_puts_slots_in_a_row_and_leaves_keys_as_they_were_rotated(rng):
    first, second = random_prefix(rng, 5), random_prefix(rng, 3)
    both = cartridge.compose(first, second)
    np.testing.assert_array_equal(both.keys[:, :, :5], first.keys)
    np.testing.assert_array_equal(both.keys[:, :, 5:], second.keys)
    np.testing.assert_array_equal(both.values[:, :, :5], first.values)
    np.testing.assert_array_equal(both.values[:, :, 5:], second.values)
    np.testing.assert_array_equal(both.positions, [0, 1, 2, 3, 4, 0, 1, 2])


def test_next_position_of_a_composition_is_the_sum_of_the_parts_and_not_their_slots(rng):
    thinned = random_prefix(rng, 4).replace(positions=jnp.array([0, 7, 8, 30]), next_position=jnp.int32(31))
    assert cartridge.compose(thinned, random_prefix(rng, 5)).next_position == 36


def test_nested_compositions_equal_a_flat_one(rng):
    a, b, c = (random_prefix(rng, n) for n in (2, 3, 1))
    flat = cartridge.compose(a, b, c)
    for nested in (cartridge.compose(cartridge.compose(a, b), c), cartridge.compose(a, cartridge.compose(b, c))):
        jax.tree.map(np.testing.assert_array_equal, nested, flat)


def test_a_part_without_a_bias_gets_zeros_beside_one_that_has_it(rng):
    plain, biased = random_prefix(rng, 2), random_prefix(rng, 3, bias=True)
    bias = cartridge.compose(plain, biased).bias
    np.testing.assert_array_equal(bias[:, :, :2], np.zeros((L, K, 2)))
    np.testing.assert_array_equal(bias[:, :, 2:], biased.bias)
    assert cartridge.compose(plain, plain).bias is None


@pytest.mark.parametrize("other", [{"dtype": jnp.bfloat16}, {"layers": 4}, {"heads": 1}, {"width": 8}], ids=str)
def test_prefixes_of_different_models_are_not_composed(rng, other):
    with pytest.raises(ValueError, match="different models"):
        cartridge.compose(random_prefix(rng), random_prefix(rng, **other))


def test_composing_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        cartridge.compose()


def test_a_slice_keeps_its_slots_positions_and_bias_and_the_texts_length(rng):
    both = cartridge.compose(random_prefix(rng, 3, bias=True), random_prefix(rng, 4, bias=True))
    part = cartridge.slice_slots(both, 2, 5)
    np.testing.assert_array_equal(part.keys, both.keys[:, :, 2:5])
    np.testing.assert_array_equal(part.values, both.values[:, :, 2:5])
    np.testing.assert_array_equal(part.bias, both.bias[:, :, 2:5])
    np.testing.assert_array_equal(part.positions, [2, 0, 1])
    assert part.next_position == 7


@pytest.mark.parametrize("start, stop", [(-1, 2), (2, 2), (3, 2), (0, 6)])
def test_a_slice_outside_the_slots_is_refused(rng, start, stop):
    with pytest.raises(ValueError, match="slots"):
        cartridge.slice_slots(random_prefix(rng), start, stop)


def test_bytes_are_those_of_the_stored_dtype_with_the_bias(rng):
    slots = 2 * L * K * P * H  # keys and values
    assert random_prefix(rng).nbytes == slots * 4
    assert random_prefix(rng, dtype=jnp.bfloat16).nbytes == slots * 2
    assert random_prefix(rng, dtype=jnp.bfloat16, bias=True).nbytes == slots * 2 + L * K * P * 4


def test_bytes_are_known_from_shapes_alone(rng):
    prefix = random_prefix(rng, bias=True)
    assert jax.eval_shape(lambda: prefix).nbytes == prefix.nbytes


def test_casting_changes_keys_and_values_and_not_the_bias(rng):
    prefix = random_prefix(rng, bias=True)
    cast = prefix.astype(jnp.bfloat16)
    assert (cast.keys.dtype, cast.values.dtype, cast.bias.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
    )
    np.testing.assert_array_equal(cast.keys, prefix.keys.astype(jnp.bfloat16))


def test_next_position_is_a_leaf_so_that_prefixes_of_other_texts_share_a_compiled_function(rng):
    following = jax.jit(lambda prefix: prefix.next_position + 1)
    for position in (40, 90):
        assert following(random_prefix(rng).replace(next_position=jnp.int32(position))) == position + 1
    assert following(random_prefix(rng)) == P + 1
    assert following._cache_size() == 1


def test_prefixes_of_equal_size_are_stacked_whatever_their_next_position(rng):
    near, far = random_prefix(rng), random_prefix(rng).replace(next_position=jnp.int32(90))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), near, far)
    assert stacked.keys.shape == (2, L, K, P, H)
    assert stacked.next_position.tolist() == [P, 90]
    back = jax.tree.map(lambda part: part[1], stacked)
    jax.tree.map(np.testing.assert_array_equal, back, far)


def test_unstacked_a_prefix_has_the_same_slots_and_bytes_in_arrays_of_each_layer(rng):
    prefix = random_prefix(rng, bias=True)
    unstacked = prefix.unstacked()
    np.testing.assert_array_equal(np.stack(unstacked.keys), prefix.keys)
    np.testing.assert_array_equal(np.stack(unstacked.values), prefix.values)
    sizes = [(one.num_layers, one.num_slots, one.nbytes) for one in (unstacked, prefix)]
    assert sizes[0] == sizes[1]


def test_padding_adds_slots_that_no_token_sees_and_nothing_to_a_full_prefix(rng):
    prefix = random_prefix(rng, 3, bias=True)
    padded = cartridge.pad_slots(prefix, 5)
    jax.tree.map(np.testing.assert_array_equal, cartridge.slice_slots(padded, 0, 3), prefix)
    assert np.exp(np.asarray(padded.bias[:, :, 3:])).max() == 0
    assert cartridge.pad_slots(prefix, 3) is prefix
