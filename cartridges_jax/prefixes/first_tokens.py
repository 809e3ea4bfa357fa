"""The corpus's first p tokens: the paper's initialiser (section 3.2) and its truncated-context baseline.

In the paper's ablation (LongHealth, Llama-3.2-3B) cartridges that start from them reach 55.3 % accuracy, from tokens of
an unrelated text 51.3 %, from random vectors 29.9 %.
"""

from __future__ import annotations

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.prefixes.registry import register


def first_tokens(model: Model, text: str, num_slots: int) -> list[int]:
    """A text as a system message, cut to `num_slots` tokens with the closing tokens of the message kept last.

    Raises:
      UserError: the text is shorter than the cartridge would be, or `num_slots` has no room for the template's own
        tokens.
    """
    rendered = model.chat.system_prefix(text)
    begin, end = rendered.spans[0]
    closing = rendered.token_ids[end:]
    content = num_slots - len(closing)
    if len(rendered.token_ids) <= num_slots:
        raise UserError(
            f"the document fills {len(rendered.token_ids)} tokens, a cartridge of {num_slots} slots would not "
            f"be smaller: choose fewer slots (--config.cartridge.num_slots={len(rendered.token_ids) // 8})"
        )
    if content <= begin:
        raise UserError(
            f"{num_slots} slots leave no room beside the {begin + len(closing)} tokens of the chat template: "
            f"choose at least {begin + len(closing) + 1}"
        )
    return rendered.token_ids[:content] + closing


def initialise_from_first_tokens(model: Model, text: str, num_slots: int) -> KVPrefix:
    """The model's own keys and values of a text's first tokens, as a prefix of P = `num_slots` slots.

    Raises:
      UserError: as `first_tokens`.
    """
    return sampling.prefill(model, first_tokens(model, text, num_slots))


def _fits(model: Model, corpus: TokenizedCorpus, num_slots: int) -> None:
    first_tokens(model, corpus.text, num_slots)


@register("first_tokens", title="The first tokens", fits=_fits)
def make_first_tokens(
    model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0
) -> KVPrefix:
    """The first tokens of the corpus's text (several documents: one after the other, each after its name)."""
    return initialise_from_first_tokens(model, corpus.text, num_slots)
