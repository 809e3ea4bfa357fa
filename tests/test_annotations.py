"""Annotations with shapes are checked at run time in the modules that `shape_checks.CHECKED_MODULES` names."""

from __future__ import annotations

import importlib
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import shape_checks

MODULE = '''
"""An annotated module."""

from __future__ import annotations

import functools

import flax.struct
import jax
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Pair:
    """Two arrays of one length."""

    left: Float[Array, "n"]
    right: Float[Array, "n"]
    size: int = flax.struct.field(pytree_node=False, default=1)


@functools.partial(jax.jit, static_argnames="times")
def product(x: Float[Array, "B D"], w: Float[Array, "D V"], *, times: int = 1) -> Float[Array, "B V"]:
    return times * (x @ w)


def doubled(pair: Pair) -> Pair:
    return jax.tree.map(lambda leaf: 2 * leaf, pair)
'''


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """`MODULE`, imported under the hook."""
    (tmp_path / "annotated_example.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with shape_checks.install(["annotated_example"]):
        yield importlib.import_module("annotated_example")
    del sys.modules["annotated_example"]


def test_right_shapes_pass_also_under_jit(checked):
    assert checked.product(jnp.ones((2, 3)), jnp.ones((3, 4)), times=2).shape == (2, 4)


@pytest.mark.parametrize("weights", [jnp.ones((4, 3)), jnp.ones((3, 4), jnp.int32), jnp.ones(3)])
def test_a_wrong_shape_or_dtype_is_an_error_while_jit_traces(checked, weights):
    with pytest.raises(jaxtyping.TypeCheckError):
        checked.product(jnp.ones((2, 3)), weights)


def test_a_pytree_class_may_hold_other_leaves_than_arrays(checked):
    pair = checked.doubled(checked.Pair(jnp.ones(3), jnp.ones(3)))
    assert jax.tree.map(lambda leaf: float(leaf.sum()), pair).left == 6.0
    assert jax.jit(checked.doubled)(pair).right.shape == (3,)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked.doubled([1.0])


def test_every_checked_module_was_imported_under_the_hook():
    for name in shape_checks.CHECKED_MODULES:
        module = importlib.import_module(name)
        assert type(module.__loader__).__module__.startswith("jaxtyping"), f"{name} was imported before the hook"
