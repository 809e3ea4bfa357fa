"""The registry of prefixes, and how a cartridge is initialised from one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model


class Maker(Protocol):
    """A function that builds a prefix.

    Args:
      model: the frozen model.
      corpus: the documents, in tokens.
      num_slots: P, the size to aim for. Members whose size follows from something else ignore it.
      rng: source of all random draws.
      room: positions of the model's context to keep free for a conversation after the prefix.
      argument: the text after the colon of the name; passed only to members registered with an `Argument`.

    Returns:
      A prefix in the model's dtype, or None where no token precedes the conversation.

    Raises:
      UserError: a size or an argument that this model and this corpus do not allow.
    """

    def __call__(
        self, model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0
    ) -> KVPrefix | None: ...


@dataclasses.dataclass(frozen=True)
class Argument:
    """The text that a member takes after the colon of its name.

    Attributes:
      hint: what it is, for messages: "DIR" in "pretrained:DIR".
      check: raises UserError for an argument that cannot be used; cheap, needs no model.
      required: False where the member has a default.
      fingerprint: hash of the files that the argument refers to, "" where it refers to none; an input of the stages.
    """

    hint: str
    check: Callable[[str], None]
    required: bool = True
    fingerprint: Callable[[str], str] = lambda argument: ""


@dataclasses.dataclass(frozen=True)
class Member:
    """A registered prefix.

    Attributes:
      name: the name in configs and reports.
      title: a few words for readers of reports.
      make: builds it.
      argument: what the name takes after a colon, if anything.
      fits: raises UserError, without running the model, where `make` would fail or where the prefix would exceed
        `num_slots`; called as `fits(model, corpus, num_slots)`, with `argument=` where there is one.
    """

    name: str
    title: str
    make: Callable[..., KVPrefix | None]
    argument: Argument | None = None
    fits: Callable[..., None] | None = None

    @property
    def usage(self) -> str:
        """The name as a user writes it: "pretrained:DIR", "summary[:TOKENS]"."""
        if self.argument is None:
            return self.name
        return f"{self.name}:{self.argument.hint}" if self.argument.required else f"{self.name}[:{self.argument.hint}]"


PREFIXES: dict[str, Member] = {}


def register(
    name: str,
    *,
    title: str,
    argument: Argument | None = None,
    fits: Callable[..., None] | None = None,
) -> Callable[[Callable[..., KVPrefix | None]], Callable[..., KVPrefix | None]]:
    """Registers a `Maker` under a name; a later registration of the same name replaces the earlier one.

    Args:
      name: without a colon.
      title, argument, fits: see `Member`.

    Raises:
      ValueError: an empty name, or one with a colon.
    """
    if not name or ":" in name:
        raise ValueError(f"name={name!r}: a prefix needs a name without a colon, which introduces an argument")

    def add(make: Callable[..., KVPrefix | None]) -> Callable[..., KVPrefix | None]:
        PREFIXES[name] = Member(name, title, make, argument, fits)
        return make

    return add


def make_prefix(
    name: str,
    model: Model,
    corpus: TokenizedCorpus,
    num_slots: int,
    rng: np.random.Generator,
    *,
    room: int = 0,
) -> KVPrefix | None:
    """Builds a registered prefix.

    Args:
      name: a member's name, with its argument after a colon where it takes one.
      model, corpus, num_slots, rng, room: see `Maker`.

    Returns:
      The prefix, or None where no token precedes the conversation.

    Raises:
      UserError: an unknown name, a bad argument, or what the member refuses.
    """
    member, argument = _parsed(name)
    return member.make(model, corpus, num_slots, rng, room=room, **argument)


def make_initial_prefix(
    name: str,
    model: Model,
    corpus: TokenizedCorpus,
    num_slots: int,
    rng: np.random.Generator,
    *,
    num_frozen: int = 0,
) -> KVPrefix:
    """Builds the prefix that the training of a cartridge starts from.

    Args:
      name, model, corpus, rng: as for `make_prefix`.
      num_slots: the most slots that the cartridge may have. `summary`, `none`, `whole_text` and `pretrained` may give
        fewer: the cartridge then has that many, and the caller reports it.
      num_frozen: slots that will not be trained.

    Returns:
      A prefix of more than `num_frozen` and at most `num_slots` slots.

    Raises:
      UserError: as `make_prefix`, or a prefix of another size.
    """
    check_initial_prefix(name, model, corpus, num_slots)
    prefix = make_prefix(name, model, corpus, num_slots, rng)
    found = 0 if prefix is None else prefix.num_slots
    if prefix is None or found <= num_frozen:
        raise UserError(
            f"cartridge.init={name!r} gives {found} slots, of which {num_frozen} are frozen: there is nothing to "
            "train, choose another initial prefix"
        )
    refuse_larger(name, found, num_slots)
    return prefix


def refuse_larger(what: str, found: int, num_slots: int) -> None:
    """Raises UserError where an initial prefix would have more than the cartridge's `num_slots` slots."""
    if found > num_slots:
        raise UserError(
            f"{what} fills {found} slots and the cartridge has {num_slots}: raise cartridge.num_slots or choose "
            "another cartridge.init"
        )


def check_prefix_name(name: str) -> None:
    """Checks a name and its argument without a model.

    Raises:
      UserError: an unknown name; the message lists those there are. A missing, unexpected or unusable argument.
    """
    _parsed(name)


def check_initial_prefix(name: str, model: Model, corpus: TokenizedCorpus, num_slots: int) -> None:
    """Checks that a cartridge can be initialised so, without running the model.

    Raises:
      UserError: as `make_initial_prefix`, as far as it can be known beforehand.
    """
    member, argument = _parsed(name)
    if member.fits is not None:
        member.fits(model, corpus, num_slots, **argument)


def prefix_title(name: str) -> str:
    """A few words that describe a prefix to the reader of a report, its argument in parentheses.

    Raises:
      UserError: as `check_prefix_name`.
    """
    member, argument = _parsed(name)
    given = argument.get("argument")
    return f"{member.title} ({given})" if given else member.title


def prefix_fingerprint(name: str) -> str:
    """Hash of the files that a name's argument refers to; "" where it refers to none.

    Raises:
      UserError: as `check_prefix_name`.
    """
    member, argument = _parsed(name)
    return member.argument.fingerprint(argument["argument"]) if member.argument else ""


def _parsed(name: str) -> tuple[Member, dict[str, str]]:
    """The member that a name refers to, and {"argument": …} where the member takes one."""
    plain, colon, argument = name.partition(":")
    member = PREFIXES.get(plain)
    if member is None:
        known = ", ".join(PREFIXES[registered].usage for registered in sorted(PREFIXES))
        raise UserError(f"there is no prefix {name!r}: choose one of {known}")
    if member.argument is None:
        if colon:
            raise UserError(f"the prefix {name!r}: {plain!r} takes no argument, leave out {colon + argument!r}")
        return member, {}
    if not argument:
        if member.argument.required or colon:
            raise UserError(f"the prefix {name!r} lacks its argument: write {member.usage}")
        return member, {"argument": ""}
    member.argument.check(argument)
    return member, {"argument": argument}
