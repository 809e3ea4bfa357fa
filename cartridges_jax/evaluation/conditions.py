"""The four conditions: they differ in the KV prefix that stands in front, in nothing else."""

from __future__ import annotations

import dataclasses

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.models import Model
from cartridges_jax.parallel import place_prefix
from cartridges_jax.prefixes.first_tokens import first_tokens


@dataclasses.dataclass(frozen=True)
class Condition:
    """A name and what stands in front of the conversation (None: nothing at all)."""

    name: str
    prefix: KVPrefix | None

    @property
    def prefix_tokens(self) -> int:
        return 0 if self.prefix is None else self.prefix.num_slots

    @property
    def kv_bytes(self) -> int:
        """Live slots in their stored dtype (rule 4 of evaluation)."""
        return 0 if self.prefix is None else self.prefix.nbytes


def icl_tokens(model: Model, corpus: TokenizedCorpus, room: int) -> tuple[list[int], int]:
    """The whole document as a system message, cut where the context has no room.

    Args:
      room: positions kept free for the conversation.

    Returns:
      (token ids, document tokens that were cut).
    """
    rendered = model.chat.system_prefix(corpus.text)
    excess = max(0, len(rendered.token_ids) + room - model.config.context_length)
    end = rendered.spans[0][1]
    return rendered.token_ids[: end - excess] + rendered.token_ids[end:], excess


def conditions(model: Model, corpus: TokenizedCorpus, cartridge: KVPrefix, *, room: int) -> tuple[list[Condition], int]:
    """`none`, `truncated`, `icl` and `cartridge` for one document.

    Returns:
      The conditions, and how many of the document's tokens `icl` had to leave out.
    """
    head = model.chat.default_head()
    whole, cut = icl_tokens(model, corpus, room)
    return [
        Condition("none", sampling.prefill(model, head) if head else None),
        Condition("truncated", sampling.prefill(model, first_tokens(model, corpus.text, cartridge.num_slots))),
        Condition("icl", sampling.prefill(model, whole)),
        Condition("cartridge", place_prefix(cartridge, model.mesh, in_use=True)),
    ], cut
