"""The first tokens of a text that has nothing to do with the corpus.

As an initialiser it is the paper's ablation "tokens of an unrelated text" (51.3 % on LongHealth, against 55.3 % from the
corpus's own first tokens). As a baseline it shows how much of a score comes from having any prefix of that size.
"""

from __future__ import annotations

import functools
from importlib import resources

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.models import Model
from cartridges_jax.prefixes.first_tokens import first_tokens
from cartridges_jax.prefixes.registry import register


@functools.cache
def shipped_text() -> str:
    """An essay on kitchen gardens, written for this package: about 1,900 words."""
    path = resources.files("cartridges_jax") / "assets" / "unrelated.md"
    return path.read_text(encoding="utf-8").strip()


def unrelated_tokens(model: Model, num_slots: int) -> list[int]:
    """`num_slots` tokens of the shipped text as a system message; the text is repeated where it is too short.

    Raises:
      UserError: `num_slots` has no room for the template's own tokens.
    """
    text = shipped_text()
    # A vocabulary's longest tokens are bounded, so this ends.
    while len(model.chat.system_prefix(text).token_ids) <= num_slots:
        text = f"{text}\n\n{text}"
    return first_tokens(model, text, num_slots)


def _fits(model: Model, corpus: TokenizedCorpus, num_slots: int) -> None:
    unrelated_tokens(model, num_slots)


@register("unrelated_text", title="Tokens of an unrelated text", fits=_fits)
def make_unrelated_text(
    model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0
) -> KVPrefix:
    """`num_slots` slots, laid out as those of `first_tokens`."""
    return sampling.prefill(model, unrelated_tokens(model, num_slots))
