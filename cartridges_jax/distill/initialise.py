"""Where a cartridge starts from (paper section 3.2 and its ablation)."""

from __future__ import annotations

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model


def first_tokens(model: Model, text: str, num_slots: int) -> list[int]:
    """The corpus as a system message, cut to p tokens with the turn's close kept last.

    Raises:
      UserError: the text is shorter than the cartridge would be, or p has no room for
        the template's own tokens.
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
    """A prefix of P slots: the model's own keys and values of the first p tokens."""
    return sampling.prefill(model, first_tokens(model, text, num_slots))
