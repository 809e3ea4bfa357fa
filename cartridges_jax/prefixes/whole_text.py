"""The whole corpus in context: in-context learning (ICL), the quality that a cartridge is compared with."""

from __future__ import annotations

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.prefixes.registry import refuse_larger, register


def whole_text_tokens(model: Model, corpus: TokenizedCorpus, room: int) -> tuple[list[int], int]:
    """The whole corpus as a system message, cut at its end where the context has no room.

    Args:
      room: positions to keep free for the conversation.

    Returns:
      (token ids, tokens of the corpus that were cut).

    Raises:
      UserError: the context has no room for any token of the corpus.
    """
    rendered = model.chat.system_prefix(corpus.text)
    begin, end = rendered.spans[0]
    excess = max(0, len(rendered.token_ids) + room - model.config.context_length)
    if end - excess <= begin:
        raise UserError(
            f"a conversation of {room} tokens leaves no room for the text in the model's context of "
            f"{model.config.context_length}: shorten questions and answers"
        )
    return rendered.token_ids[: end - excess] + rendered.token_ids[end:], excess


def _fits(model: Model, corpus: TokenizedCorpus, num_slots: int) -> None:
    refuse_larger("the whole text", len(model.chat.system_prefix(corpus.text).token_ids), num_slots)


@register("whole_text", title="The whole text", fits=_fits)
def make_whole_text(
    model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0
) -> KVPrefix:
    """The corpus as a system message, cut so that `room` positions of the context stay free.

    Its size is the text's. As an initialiser it gives a cartridge as large as the text, so it is refused where that
    exceeds `num_slots`.
    """
    return sampling.prefill(model, whole_text_tokens(model, corpus, room)[0])
