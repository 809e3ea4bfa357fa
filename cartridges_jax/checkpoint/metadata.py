"""The identity of a cartridge: its model, its documents and the training behind it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.formats.sources import public_name

if TYPE_CHECKING:
    from cartridges_jax.models import Model

PLAIN_POSITIONS = "0..P-1, next_position P"
EXPLICIT_POSITIONS = "explicit: arrays/positions"
# Settings of a run that are also parameters of `load_model`.
_MODEL_OPTIONS = ("dtype", "weights", "thinking", "windows_see_prefix")
# A user accepts a licence for themselves; a cartridge cannot hand the acceptance on.
_LICENSE_FLAG = "accept_license"
# Such as "pretrained:/home/me/cartridge"; an address ("https://…") is not a path.
_NAMED_PATH = re.compile(r"(?P<name>\w+:)?(?P<path>(/(?!/)|~).*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class DocumentSource:
    """A document that a cartridge was trained on: its name, SHA-256 and length in tokens."""

    name: str
    sha256: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class CartridgeMetadata:
    """The identity of a cartridge, built by `CartridgeMetadata.of`.

    Hashes are SHA-256 in hex; "" where a cartridge of format version 1 did not store one.

    Attributes:
      model_name: the model it was trained for: a registry name, a hub id, or the last part of a local path.
      model_is_local: whether `model_name` is the last part of a path, and so names no public model.
      model_fingerprint: hash of that model's config and tokenizer.
      weights_sha256: hash of its weight files (`Model.source_sha256`).
      tokenizer_sha256: hash of everything that decides its token ids.
      chat_template_sha256: hash of its chat template's source. Recorded, not compared by `check_compatible`: publishers
        revise templates without changing the model.
      num_layers, num_kv_heads, num_slots, head_dim: L, K, P, H of the keys.
      dtype: name of the keys' and values' dtype.
      next_position: position of the first token after the prefix.
      position_convention: PLAIN_POSITIONS or EXPLICIT_POSITIONS.
      frozen_slots: the slots that did not learn, as half-open ranges.
      documents: the texts it was trained on, in order.
      step: the training step at which it was saved.
      config: the training config as JSON, without licence flag and without local paths (see `portable_config`).
    """

    model_name: str
    model_is_local: bool
    model_fingerprint: str
    weights_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    num_layers: int
    num_kv_heads: int
    num_slots: int
    head_dim: int
    dtype: str
    next_position: int
    position_convention: str
    frozen_slots: tuple[tuple[int, int], ...]
    documents: tuple[DocumentSource, ...]
    step: int
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        prefix: KVPrefix,
        *,
        model: Model,
        learning_mask: Sequence[bool] | np.ndarray,
        documents: Sequence[DocumentSource],
        step: int,
        config: Mapping[str, Any],
    ) -> CartridgeMetadata:
        """The metadata of `prefix`: its shapes and positions are read off it, the rest is given.

        Args:
          model: the model it was trained for.
          learning_mask: [P] bool, True where the slot learns.
          documents: at least one.
          config: anything that JSON can hold; tuples come back as lists.

        Raises:
          ValueError: a learning mask of another length than P, or no documents.
        """
        num_layers, num_kv_heads, num_slots, head_dim = prefix.keys.shape
        learning_mask = np.asarray(learning_mask, bool)
        if learning_mask.shape != (num_slots,):
            raise ValueError(
                f"learning mask of shape {learning_mask.shape} for {num_slots} slots: give one bool per slot"
            )
        if not documents:
            raise ValueError("documents is empty: name at least one")
        # The edges of the mask, with learning slots assumed at both ends.
        edges = np.flatnonzero(np.diff(np.pad(learning_mask, 1, constant_values=True)))
        next_position = int(prefix.next_position)
        plain = next_position == num_slots and np.array_equal(prefix.positions, np.arange(num_slots))
        model_name, model_is_local = public_name(model.name)
        return cls(
            model_name=model_name,
            model_is_local=model_is_local,
            model_fingerprint=model.fingerprint,
            weights_sha256=model.source_sha256,
            tokenizer_sha256=model.tokenizer_sha256,
            chat_template_sha256=model.chat_template_sha256,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            num_slots=num_slots,
            head_dim=head_dim,
            dtype=jnp.dtype(prefix.keys.dtype).name,
            next_position=next_position,
            position_convention=PLAIN_POSITIONS if plain else EXPLICIT_POSITIONS,
            frozen_slots=tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2)),
            documents=tuple(documents),
            step=int(step),
            config=portable_config(config),
        )

    @property
    def learning_mask(self) -> np.ndarray:
        """[P] bool, True where the slot learns."""
        mask = np.ones((self.num_slots,), bool)
        for start, stop in self.frozen_slots:
            mask[start:stop] = False
        return mask

    def model_to_load(self) -> str:
        """The name by which `load_model` finds the model again.

        Raises:
          UserError: it was trained for a local model, of which no file or directory of that name is here.
        """
        if self.model_is_local and not Path(self.model_name).exists():
            raise UserError(
                f"this cartridge was trained for the local model {self.model_name!r}: give its path with --model=PATH"
            )
        return self.model_name

    @property
    def model_options(self) -> dict[str, Any]:
        """The arguments of `load_model`, beside the name, that give the model it was trained with."""
        return {name: self.config[name] for name in _MODEL_OPTIONS if name in self.config}

    @property
    def num_frozen(self) -> int:
        """The number of slots that did not learn."""
        return sum(stop - start for start, stop in self.frozen_slots)

    @property
    def num_tokens(self) -> int:
        """The length of all documents, in tokens."""
        return sum(document.tokens for document in self.documents)


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A training config as a cartridge stores it: JSON that tells nothing about the machine.

    The licence flag is left out. A model becomes its public name; every other absolute path, and every relative one
    that exists here, becomes its last part. Settings that belong to no path are unchanged.
    """
    portable = {name: _portable(value) for name, value in config.items() if name != _LICENSE_FLAG}
    if isinstance(portable.get("model"), str):
        portable["model"] = public_name(config["model"])[0]
    if isinstance(config.get("corpus"), str) and not _exists(config["corpus"]):
        # Several files, separated by commas.
        portable["corpus"] = ",".join(_without_path(part.strip()) for part in config["corpus"].split(","))
    return json.loads(json.dumps(portable))


def _portable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, Path):
        return value.name
    return _without_path(value) if isinstance(value, str) else value


def _without_path(text: str) -> str:
    if match := _NAMED_PATH.fullmatch(text):
        return (match["name"] or "") + Path(match["path"]).name
    head, colon, tail = text.rpartition(":") if "://" not in text else ("", "", text)
    return head + colon + Path(tail).name if "/" in tail and _exists(tail) else text


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def check_compatible(metadata: CartridgeMetadata, model: Model, *, allow_other_weights: bool = False) -> None:
    """Refuses a cartridge of another model.

    A model that was only renamed or moved is the same model. Another file format or quantisation of the same weights
    counts as other weights: a cartridge trained on one works less well on the other. Cartridges of format version 1
    know no weights and are compared by config and tokenizer alone.

    Args:
      allow_other_weights: accepts weights that differ, such as another quantisation or a fine-tuned model.

    Raises:
      UserError: another architecture, config or tokenizer, or other weights.
    """
    config = model.config
    trained_for = (metadata.num_layers, metadata.num_kv_heads, metadata.head_dim)
    found = (config.num_layers, config.num_kv_heads, config.head_dim)
    if trained_for != found:
        raise UserError(
            f"this cartridge was trained for {metadata.model_name} with (layers, kv heads, "
            f"head width) {trained_for}, and {model.name} has {found}; load "
            f"{metadata.model_name} or train a cartridge for {model.name}"
        )
    if metadata.model_fingerprint != model.fingerprint:
        raise UserError(
            f"this cartridge was trained for {metadata.model_name} (fingerprint "
            f"{metadata.model_fingerprint[:12]}), and {model.name} (fingerprint "
            f"{model.fingerprint[:12]}) differs from it in config or tokenizer; load the model it "
            f"was trained for or train a cartridge for {model.name}"
        )
    if metadata.weights_sha256 not in ("", model.source_sha256) and not allow_other_weights:
        raise UserError(
            f"this cartridge was trained for {metadata.model_name} with the weights {metadata.weights_sha256[:12]}, and "
            f"{model.name} has the weights {model.source_sha256[:12] or 'of no file'} (another quantisation counts as "
            "other weights); load the model it was trained for, or accept a worse result with allow_other_weights=True"
        )
