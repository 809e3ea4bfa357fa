"""The conditions of an evaluation: they differ in the KV prefix before the conversation, in nothing else."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.models import Model
from cartridges_jax.parallel import place_prefix
from cartridges_jax.prefixes import make_prefix, prefix_fingerprint, prefix_title
from cartridges_jax.prefixes.whole_text import whole_text_tokens

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


def condition_fingerprints(names: Sequence[str]) -> dict[str, str]:
    """Condition to the hash of the files that its name refers to; conditions without files are left out.

    Raises:
      UserError: an unknown name.
    """
    found = {name: prefix_fingerprint(name) for name in names if name != SUBJECT}
    return {name: fingerprint for name, fingerprint in found.items() if fingerprint}


def tokens_cut(model: Model, corpus: TokenizedCorpus, room: int) -> int:
    """Tokens at the corpus's end that the condition "whole_text" leaves out, because the context has no room.

    Args:
      room: positions to keep free for a conversation.
    """
    return whole_text_tokens(model, corpus, room)[1]
