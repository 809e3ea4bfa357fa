"""Products with matrices that are kept small, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cartridges_jax.quantized import Narrow, linear, linear_rows, mix_rows, rows


@pytest.fixture(params=["bits", "values"])
def narrow(request, rng) -> tuple[Narrow, np.ndarray]:
    """(a matrix [24, 40], the same in float64)."""
    values = jnp.asarray(rng.standard_normal((24, 40)), jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16) if request.param == "bits" else values
    return Narrow(bits), np.asarray(values, np.float64)


def exact_in_bfloat16(rng, *shape) -> jax.Array:
    """float32 numbers that bfloat16 holds: then only sums are rounded."""
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (3, 5)], ids=str)
def test_products_with_a_narrow_matrix_are_summed_in_float32(narrow, rng, shape):
    matrix, wide = narrow
    x, weights, y = (exact_in_bfloat16(rng, *shape, size) for size in (24, 24, 40))
    for found, expected in (
        (linear(x, matrix), np.asarray(x, np.float64) @ wide),
        (linear_rows(y, matrix), np.asarray(y, np.float64) @ wide.T),
        (mix_rows(weights, matrix), np.asarray(weights, np.float64) @ wide),
    ):
        assert found.dtype == jnp.float32 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_a_narrow_table_are_looked_up_exactly(narrow, rng):
    matrix, wide = narrow
    indices = rng.integers(0, 24, (3, 4))
    np.testing.assert_array_equal(rows(matrix, indices), wide[indices])


@pytest.mark.parametrize("shape", [(1,), (3, 5)], ids=str)
def test_the_gradient_through_a_narrow_product_is_float32s(narrow, rng, shape):
    matrix, wide = narrow
    x, upstream = exact_in_bfloat16(rng, *shape, 24), exact_in_bfloat16(rng, *shape, 40)
    gradient = jax.grad(lambda x: jnp.sum(linear(x, matrix) * upstream))(x)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, np.asarray(upstream, np.float64) @ wide.T, rtol=1e-5, atol=1e-5)
