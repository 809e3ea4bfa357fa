"""No text at all: only what the chat template itself writes before a first user message."""

from __future__ import annotations

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.models import Model
from cartridges_jax.prefixes.registry import refuse_larger, register


def _fits(model: Model, corpus: TokenizedCorpus, num_slots: int) -> None:
    refuse_larger("the chat template's own beginning", len(model.chat.default_head()), num_slots)


@register("none", title="No context", fits=_fits)
def make_none(
    model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0
) -> KVPrefix | None:
    """The template's default head (BOS, default system message), or None where it is empty."""
    head = model.chat.default_head()
    return sampling.prefill(model, head) if head else None
