"""Cartridges of random numbers on disk, what may happen to their files, and equality to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax import checkpoint
from cartridges_jax.cartridge import from_plain_tokens

L, K, P, H = 2, 3, 16, 8
CORPUS = checkpoint.CorpusSource(name="a book", sha256="ab" * 32, tokens=1234)
CONFIG = {"learning_rate": 2e-2, "seeds": [1, 2], "nested": {"tail": "drop", "none": None}}


def random_prefix(rng, num_slots=P, dtype=jnp.float32, bias=False):
    shape = (L, K, num_slots, H)
    prefix = from_plain_tokens(
        jnp.asarray(rng.standard_normal(shape), dtype), jnp.asarray(rng.standard_normal(shape), dtype)
    )
    if bias:
        prefix = prefix.replace(bias=jnp.asarray(rng.standard_normal(shape[:3]), jnp.float32))
    return prefix


def metadata_of(prefix, **changes):
    mask = np.arange(prefix.num_slots) > 0
    given = dict(
        model_name="tiny",
        model_fingerprint="f" * 64,
        learning_mask=mask,
        corpus=CORPUS,
        step=7,
        config=CONFIG,
    )
    return checkpoint.CartridgeMetadata.of(prefix, **{**given, **changes})


def save(directory, prefix, **changes):
    metadata = metadata_of(prefix, **changes)
    checkpoint.save_cartridge(directory, prefix, metadata)
    return metadata


def assert_same(tree, other):
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def in_one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def data_file(directory):
    """The largest file: where the arrays' values are."""
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
