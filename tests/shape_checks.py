"""Annotations of the package (shapes, dtypes, classes), checked at every call in the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# A module with jaxtyping annotations belongs in this list. Functions under `jax.jit` are checked while they are traced.
CHECKED_MODULES: list[str] = [
    "cartridges_jax.attention.attend",
    "cartridges_jax.attention.masks",
    "cartridges_jax.attention.xla",
    "cartridges_jax.cartridge",
    "cartridges_jax.models.cache",
    "cartridges_jax.models.decoder",
    "cartridges_jax.models.layer",
    "cartridges_jax.rope",
    "cartridges_jax.sampling.decoding",
    "cartridges_jax.sampling.reading",
    "cartridges_jax.sampling.rows",
]


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, with an int where a float is asked for, and without the fields of dataclasses.

    `jax.tree.map` rebuilds a pytree class with shardings, shape structs or flags in the place of its arrays
    (tests/test_annotations.py::test_a_pytree_class_may_hold_other_leaves_than_arrays).
    """
    if function.__name__ == "__init__":
        return function
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


def install(modules: list[str] = CHECKED_MODULES):
    """Checks these modules from their import on; the result is a context manager that ends it."""
    return jaxtyping.install_import_hook(modules, "shape_checks.typechecker")
