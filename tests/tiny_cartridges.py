"""Cartridges of random numbers on disk, damage to their files, and equality to the bit."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax import checkpoint
from cartridges_jax.cartridge import from_plain_tokens

L, K, P, H = 2, 3, 16, 8
DOCUMENTS = (
    checkpoint.DocumentSource(name="a book", sha256="ab" * 32, tokens=1000),
    checkpoint.DocumentSource(name="its appendix", sha256="cd" * 32, tokens=234),
)
CONFIG = {"learning_rate": 2e-2, "seeds": [1, 2], "nested": {"tail": "drop", "none": None}}


def model(**changes):
    """The identity of a model, as `Model` states it."""
    given = dict(
        name="tiny-org/tiny",
        fingerprint="f" * 64,
        source_sha256="a" * 64,
        tokenizer_sha256="b" * 64,
        chat_template_sha256="c" * 64,
        config=SimpleNamespace(num_layers=L, num_kv_heads=K, head_dim=H),
    )
    return SimpleNamespace(**{**given, **changes})


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
        model=model(),
        learning_mask=mask,
        documents=DOCUMENTS,
        step=7,
        config=CONFIG,
    )
    return checkpoint.CartridgeMetadata.of(prefix, **{**given, **changes})


def save(directory, prefix, **changes):
    metadata = metadata_of(prefix, **changes)
    checkpoint.save_cartridge(directory, prefix, metadata)
    return metadata


def save_version_1(directory, prefix, group, *, model_name="tiny", **changes):
    """A cartridge as format version 1 laid it out, written without the package's own code."""
    import orbax.checkpoint as ocp

    num_layers, num_kv_heads, num_slots, head_dim = prefix.keys.shape
    arrays = dict(keys=prefix.keys, values=prefix.values, positions=prefix.positions, group=group, bias=prefix.bias)
    arrays = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "arrays", arrays)
    record = {
        "format_version": 1,
        "model_name": model_name,
        "model_fingerprint": "f" * 64,
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "num_slots": num_slots,
        "head_dim": head_dim,
        "dtype": str(prefix.keys.dtype),
        "next_position": int(prefix.next_position),
        "position_convention": "explicit: arrays/positions",
        "frozen_slots": [[0, 2]],
        "corpus": {"name": "a book", "sha256": "ab" * 32, "tokens": 1234},
        "step": 7,
        "config": {"model": model_name, "dtype": "bfloat16", "accept_license": True, "train": {"steps": 9}},
        "num_frozen": 2,
        "arrays": {
            name: {
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
            for name, array in arrays.items()
        },
        "files": {
            path.relative_to(directory / "arrays").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (directory / "arrays").rglob("*")
            if path.is_file()
        },
        **changes,
    }
    seal = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (directory / "cartridge.json").write_text(json.dumps({**record, "sha256": seal}, indent=2) + "\n")


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
    """The largest file, which holds the arrays' values."""
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
