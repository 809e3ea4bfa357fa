"""The conditions of an evaluation: they differ in the KV prefix before the conversation, in nothing else."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.distill.initialise import first_tokens
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.parallel import place_prefix

# The condition that the others are compared with, the one whose answers count as right, and the one under test.
BASELINE, JUDGE, SUBJECT = "none", "whole_text", "cartridge"
CONDITIONS = (BASELINE, "first_tokens", JUDGE, SUBJECT)
_ROLES = {BASELINE: "baseline", JUDGE: "judge", SUBJECT: "subject"}
# Sets evaluation's random numbers apart from those of a run's other stages with the same seed.
_STREAM = zlib.crc32(b"evaluation")


@dataclasses.dataclass(frozen=True)
class Condition:
    """A KV prefix with a name.

    Attributes:
      name: its key in reports.
      prefix: the prefix before every conversation; None for none at all.
      title: its name for readers.
    """

    name: str
    prefix: KVPrefix | None
    title: str = ""

    @property
    def role(self) -> str:
        """ "baseline", "judge", "subject" (the one under test) or "" for the others."""
        return _ROLES.get(self.name, "")

    @property
    def prefix_tokens(self) -> int:
        return 0 if self.prefix is None else self.prefix.num_slots

    @property
    def kv_bytes(self) -> int:
        """Live slots in their stored dtype (rule 4 of evaluation)."""
        return 0 if self.prefix is None else self.prefix.nbytes


def make_conditions(
    model: Model,
    corpus: TokenizedCorpus,
    cartridge: KVPrefix,
    names: Sequence[str] = CONDITIONS,
    *,
    room: int,
    seed: int = 0,
) -> list[Condition]:
    """Returns the named conditions, in order.

    Args:
      cartridge: the prefix of the condition "cartridge"; the others get as many slots, where they have a choice.
      names: "cartridge", or names of the prefix registry.
      room: positions to keep free for a conversation.
      seed: of the prefixes that are drawn; each name has a stream of random numbers of its own.

    Raises:
      UserError: an unknown name.
    """
    found = []
    for name in names:
        if name == SUBJECT:
            prefix = place_prefix(cartridge, model.mesh, in_use=True)
        else:
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM, zlib.crc32(name.encode()))))
            prefix = make_prefix(name, model, corpus, cartridge.num_slots, rng, room=room)
        found.append(Condition(name, prefix, condition_title(name)))
    return found


def condition_title(name: str) -> str:
    """A condition's name for readers.

    Raises:
      UserError: an unknown name.
    """
    return "Cartridge" if name == SUBJECT else prefix_title(name)


def tokens_cut(model: Model, corpus: TokenizedCorpus, room: int) -> int:
    """Tokens at the corpus's end that the whole text's condition leaves out, because the context has no room.

    Args:
      room: positions to keep free for a conversation.
    """
    return max(0, len(model.chat.system_prefix(corpus.text).token_ids) + room - model.config.context_length)


_TITLES = {"none": "No document", "first_tokens": "First tokens", "whole_text": "Whole text"}


def prefix_title(name: str) -> str:
    """A prefix's name for readers.

    Raises:
      UserError: an unknown name.
    """
    if name not in _TITLES:
        raise UserError(f"prefix {name!r}: choose among {', '.join([*_TITLES, SUBJECT])}")
    return _TITLES[name]


def make_prefix(
    name: str, model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0
) -> KVPrefix | None:
    """Returns the prefix with this name; None where the template itself writes nothing before a conversation.

    Raises:
      UserError: an unknown name.
    """
    prefix_title(name)
    if name == "none":
        head = model.chat.default_head()
        return sampling.prefill(model, head) if head else None
    if name == "first_tokens":
        return sampling.prefill(model, first_tokens(model, corpus.text, num_slots))
    rendered = model.chat.system_prefix(corpus.text)
    end = rendered.spans[0][1]
    return sampling.prefill(
        model, rendered.token_ids[: end - tokens_cut(model, corpus, room)] + rendered.token_ids[end:]
    )
