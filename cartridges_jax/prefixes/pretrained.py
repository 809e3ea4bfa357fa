"""A cartridge from disk: training continues from it, or it is measured beside the new one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.checkpoint import RECORD, check_compatible, load_cartridge
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.prefixes.registry import Argument, refuse_larger, register


def _record(directory: str) -> Path:
    return Path(directory).expanduser() / RECORD


def _check(directory: str) -> None:
    if not _record(directory).is_file():
        raise UserError(
            f"the prefix 'pretrained:{directory}': {directory} is not a cartridge (it has no {RECORD}); give the "
            "directory of a saved cartridge"
        )


def _fingerprint(directory: str) -> str:
    # The record holds the hashes of the arrays.
    return hashlib.sha256(_record(directory).read_bytes()).hexdigest()


def _loaded(model: Model, directory: str) -> KVPrefix:
    cartridge = load_cartridge(_record(directory).parent)
    check_compatible(cartridge.metadata, model)
    return cartridge.prefix


def _fits(model: Model, corpus: TokenizedCorpus, num_slots: int, *, argument: str) -> None:
    refuse_larger(f"the cartridge in {argument}", _loaded(model, argument).num_slots, num_slots)


@register(
    "pretrained",
    title="A pretrained cartridge",
    argument=Argument("DIR", _check, fingerprint=_fingerprint),
    fits=_fits,
)
def make_pretrained(
    model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0, argument: str
) -> KVPrefix:
    """The saved prefix as it is, in its stored dtype; its size is its own.

    Raises:
      UserError: a damaged cartridge, or one of another model.
    """
    return parallel.place_prefix(_loaded(model, argument), model.mesh, in_use=True)
