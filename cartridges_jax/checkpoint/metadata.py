"""What a cartridge belongs to: the model, the corpus, the training that made it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError

PLAIN_POSITIONS = "0..P-1, next_position P"
EXPLICIT_POSITIONS = "explicit: arrays/positions"
# Settings of a run that are `load_model`'s, too.
_MODEL_OPTIONS = ("dtype", "weights", "thinking", "windows_see_prefix", "accept_license")


@dataclasses.dataclass(frozen=True)
class CorpusSource:
    """The text a cartridge stands for: its name, SHA-256 and length in tokens."""

    name: str
    sha256: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class CartridgeMetadata:
    """What a cartridge belongs to and how it came about. Made by `CartridgeMetadata.of`.

    Attributes:
      model_name: the model it was trained for.
      model_fingerprint: SHA-256 of that model's config and tokenizer.
      num_layers, num_kv_heads, num_slots, head_dim: L, K, P, H of the keys.
      dtype: name of the keys' and values' dtype.
      next_position: position of the first token behind the prefix.
      position_convention: PLAIN_POSITIONS or EXPLICIT_POSITIONS.
      frozen_slots: the slots that did not learn, as half-open ranges.
      corpus: the text it stands for.
      step: the training step at which it was saved.
      config: the full training config, as JSON gives it back.
    """

    model_name: str
    model_fingerprint: str
    num_layers: int
    num_kv_heads: int
    num_slots: int
    head_dim: int
    dtype: str
    next_position: int
    position_convention: str
    frozen_slots: tuple[tuple[int, int], ...]
    corpus: CorpusSource
    step: int
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        prefix: KVPrefix,
        *,
        model_name: str,
        model_fingerprint: str,
        learning_mask: Sequence[bool] | np.ndarray,
        corpus: CorpusSource,
        step: int,
        config: Mapping[str, Any],
    ) -> CartridgeMetadata:
        """The metadata of `prefix`: what can be read off it is, the rest is given.

        Args:
          learning_mask: [P] bool, True where the slot learns.
          config: anything that JSON can hold; tuples come back as lists.

        Raises:
          ValueError: a learning mask of another length than P.
        """
        num_layers, num_kv_heads, num_slots, head_dim = prefix.keys.shape
        learning_mask = np.asarray(learning_mask, bool)
        if learning_mask.shape != (num_slots,):
            raise ValueError(
                f"learning mask of shape {learning_mask.shape} for {num_slots} slots: give one bool per slot"
            )
        # Where the mask changes, with learning slots imagined at both ends.
        edges = np.flatnonzero(np.diff(np.pad(learning_mask, 1, constant_values=True)))
        plain = prefix.next_position == num_slots and np.array_equal(prefix.positions, np.arange(num_slots))
        return cls(
            model_name=model_name,
            model_fingerprint=model_fingerprint,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            num_slots=num_slots,
            head_dim=head_dim,
            dtype=jnp.dtype(prefix.keys.dtype).name,
            next_position=int(prefix.next_position),
            position_convention=PLAIN_POSITIONS if plain else EXPLICIT_POSITIONS,
            frozen_slots=tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2)),
            corpus=corpus,
            step=int(step),
            config=json.loads(json.dumps(dict(config))),
        )

    @property
    def learning_mask(self) -> np.ndarray:
        """[P] bool, True where the slot learns."""
        mask = np.ones((self.num_slots,), bool)
        for start, stop in self.frozen_slots:
            mask[start:stop] = False
        return mask

    @property
    def model_options(self) -> dict[str, Any]:
        """What `load_model` has to be told beside the name, to give the model that it was trained with."""
        return {name: self.config[name] for name in _MODEL_OPTIONS if name in self.config}

    @property
    def num_frozen(self) -> int:
        return sum(stop - start for start, stop in self.frozen_slots)


def check_compatible(
    metadata: CartridgeMetadata,
    *,
    model_name: str,
    model_fingerprint: str,
    shape: tuple[int, int, int],
) -> None:
    """Refuses a cartridge in front of a model that it was not trained for.

    The fingerprint decides; a model that was only renamed or moved is the same model.

    Args:
      shape: the model's (L, K, H).

    Raises:
      UserError: another architecture, or another config or tokenizer.
    """
    trained_for = (metadata.num_layers, metadata.num_kv_heads, metadata.head_dim)
    if trained_for != tuple(shape):
        raise UserError(
            f"this cartridge was trained for {metadata.model_name} with (layers, kv heads, "
            f"head width) {trained_for}, and {model_name} has {tuple(shape)}; load "
            f"{metadata.model_name} or train a cartridge for {model_name}"
        )
    if metadata.model_fingerprint != model_fingerprint:
        raise UserError(
            f"this cartridge was trained for {metadata.model_name} (fingerprint "
            f"{metadata.model_fingerprint[:12]}), and {model_name} (fingerprint "
            f"{model_fingerprint[:12]}) differs from it in config or tokenizer; load the model it "
            f"was trained for or train a cartridge for {model_name}"
        )
