"""Learners: each splits a starting prefix into frozen and trainable parts, and joins them in every step.

The trainer, the train step and the shardings know learners only by the protocol below. A
learner is chosen by name (`train.learner`); another one is a class and a call of `register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from cartridges_jax.cartridge import PREFIX_AXES, KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model


class Learner(Protocol):
    """A choice of the parameters that are trained.

    Immutable and hashable: compiled steps are looked up by it.
    """

    def init(self, model: Model, prefix: KVPrefix) -> tuple[Any, Any]:
        """Splits the start into (frozen, trainable), two pytrees of arrays.

        Args:
          model: the frozen model. Ahead-of-time compilation traces this function with a model
            of shapes, without a tokenizer.
          prefix: P slots to start from, in any float dtype, on the model's devices.

        Returns:
          frozen: everything that `combine` needs besides the model's parameters.
          trainable: the parameters to train, float32.
        """
        ...

    def combine(self, params: Any, frozen: Any, trainable: Any) -> tuple[Any, KVPrefix]:
        """Returns the parameters and the prefix of the student's forward pass.

        Pure: the compiled step traces it.
        """
        ...

    def mask(self, frozen: Any, trainable: Any) -> Any:
        """Factors of gradients and updates: 1 trains an entry, 0 keeps its bits.

        Returns:
          One array that broadcasts against every leaf of `trainable`, or a pytree of them
          that `trainable` extends.
        """
        ...

    def axes(self, trainable: Any) -> Any:
        """Logical axis names (see `parallel.rules`): `trainable` with a tuple of names in place of each array."""
        ...

    def export(self, frozen: Any, trainable: Any) -> KVPrefix:
        """Builds the prefix that the run hands back.

        Args:
          frozen: as `init` returned it, as NumPy arrays.
          trainable: the trained parameters, as NumPy arrays.

        Returns:
          P slots on the default device.
        """
        ...


# A factory is called with num_frozen=…, the number of first slots that never change.
LEARNERS: dict[str, Callable[..., Learner]] = {}


def register(name: str) -> Callable[[Callable[..., Learner]], Callable[..., Learner]]:
    """Decorates a learner class, or a factory, that `train.learner=NAME` then chooses.

    Raises:
      ValueError: the name is taken.
    """

    def add(factory: Callable[..., Learner]) -> Callable[..., Learner]:
        if name in LEARNERS:
            raise ValueError(f"a learner {name!r} is already registered: choose another name")
        LEARNERS[name] = factory
        return factory

    return add


def make_learner(name: str, *, num_frozen: int) -> Learner:
    """Returns the learner of a registered name.

    Args:
      name: one of `LEARNERS`.
      num_frozen: first slots that never change (paper: 1, the attention sink).

    Raises:
      UserError: no such learner.
    """
    check_learner(name)
    return LEARNERS[name](num_frozen=num_frozen)


def check_learner(name: str) -> None:
    """Raises UserError if no learner has this name."""
    if name not in LEARNERS:
        raise UserError(f"train.learner={name!r}: choose one of {', '.join(LEARNERS)}")


@register("cartridge")
@dataclasses.dataclass(frozen=True)
class CartridgeLearner:
    """Trains the keys and values of the slots (paper section 3.2).

    Attributes:
      num_frozen: first slots that never change (paper: 1, the attention sink).
    """

    num_frozen: int = 1

    def init(self, model: Model, prefix: KVPrefix) -> tuple[KVPrefix, dict[str, Array]]:
        """The prefix is frozen; trainable are {"keys", "values": [L, K, P, H]}."""
        return prefix, {name: jnp.astype(getattr(prefix, name), jnp.float32) for name in ("keys", "values")}

    def combine(self, params: Any, frozen: KVPrefix, trainable: dict[str, Array]) -> tuple[Any, KVPrefix]:
        """The prefix with the trained slots; the parameters as they are."""
        return params, frozen.replace(keys=trainable["keys"], values=trainable["values"])

    def mask(self, frozen: KVPrefix, trainable: dict[str, Array]) -> Array:
        """[P, 1] float32: 0 for the first `num_frozen` slots."""
        return (jnp.arange(frozen.num_slots) >= self.num_frozen).astype(jnp.float32)[:, None]

    def axes(self, trainable: dict[str, Array]) -> dict[str, tuple[str | None, ...]]:
        """Those of a prefix."""
        return {name: PREFIX_AXES[name] for name in trainable}

    def export(self, frozen: KVPrefix, trainable: dict[str, Array]) -> KVPrefix:
        """The trained cartridge, float32."""
        _, prefix = self.combine(None, frozen, trainable)
        return jax.tree.map(jnp.asarray, prefix)
