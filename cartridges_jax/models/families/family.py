"""A family of models: the reading of its config and the names of its tensors.

To add one, write a module like its neighbours (a `Family`, or several), and list it in
`families/__init__.py`; docs/models.md has the steps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import ModelConfig

_REQUIRED = object()
# Fields of a config.json that change nothing about what the decoder computes.
_DESCRIPTIVE = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "boi_token_index", "cache_implementation", "chunk_size_feed_forward", "dtype", "eoi_token_index", "eos_token_id",
    "id2label", "image_token_index", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "mm_tokens_per_image", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache",
})  # fmt: skip


class Fields:
    """A config's fields by name, with a record of which were read, so that none is ignored.

    Attributes:
      source: what errors call the config: "config.json" or "GGUF metadata llama.*".
    """

    def __init__(self, values: Mapping[str, Any], source: str, descriptive: frozenset[str] = _DESCRIPTIVE):
        self.source = source
        self._values = values
        self._read = set(descriptive)

    def take(self, name: str, default: Any = _REQUIRED, *, null: Any = _REQUIRED) -> Any:
        """The value of a field.

        Args:
          default: what holds where it is absent.
          null: what holds where it is null; `default` unless given.

        Raises:
          UserError: it is absent, and there is no default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if name in self._values and null is not _REQUIRED:
            return null
        if default is _REQUIRED:
            raise UserError(f"{self.source} lacks the field {name}: fetch or convert the model again")
        return default

    def number(self, name: str, default: Any = _REQUIRED, *, null: Any = _REQUIRED, kind: type = int) -> Any:
        """A positive number; `default` and `null` may be anything.

        Raises:
          UserError: it is none.
        """
        value = self.take(name, default, null=null)
        if value is default or value is null:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not value > 0:
            per_layer = ", a number for every layer," if isinstance(value, (list, tuple)) else ","
            raise UserError(f"{self.source} has {name}={value!r:.60}{per_layer} where one positive number is supported")
        return kind(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses any value but the allowed ones (the first is the default): others change what is computed.

        Raises:
          UserError: another value.
        """
        value = self.take(name, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise UserError(f"{self.source} has {name}={value!r:.60}, which is not supported (only {choices})")

    def finish(self) -> None:
        """Refuses fields that were not read.

        Raises:
          UserError: there is one that is set; the message names it.
        """
        unread = sorted(name for name, value in self._values.items() if name not in self._read and value is not None)
        if unread:
            name = unread[0]
            raise UserError(
                f"{self.source} sets {name}={self._values[name]!r:.60}, which the decoder does not implement: "
                "use a model without it"
            )


class Entry(NamedTuple):
    """The parameter that a tensor fills.

    Attributes:
      parameter: name within the layer, or at the top of the tree.
      adapt: what is done to the stored tensor first (matrices are [out, in] in files).
    """

    parameter: str
    adapt: Callable[[np.ndarray, ModelConfig], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Names:
    """The table from a file's tensors to parameters.

    Attributes:
      top: tensors outside the layers.
      layer: tensors of a layer, by what follows its number.
      layer_prefix: pattern of what stands before a layer's tensor, the number its group.
      ignored: pattern of tensors that hold nothing to load.
      renames: (pattern, replacement) pairs for the beginnings of names.
    """

    top: Mapping[str, Entry]
    layer: Mapping[str, Entry]
    layer_prefix: str
    ignored: str = r"(?!)"
    renames: tuple[tuple[str, str], ...] = ()

    def place(self, name: str) -> tuple[Entry, int | None] | None:
        """(entry, layer or None) of a tensor; None if it is not to be loaded.

        Raises:
          KeyError: the table has no place for it.
        """
        if re.fullmatch(self.ignored, name):
            return None
        for pattern, replacement in self.renames:
            name = re.sub(f"^{pattern}", replacement, name)
        if match := re.match(self.layer_prefix, name):
            return self.layer[name[match.end() :]], int(match[1])
        return self.top[name], None

    def extended(self, **changes: Any) -> Names:
        """This table with entries added or replaced; `top`/`layer` are merged."""
        merged = {
            key: {**getattr(self, key), **value} if isinstance(value, Mapping) else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **merged)


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that are described and stored alike.

    Attributes:
      architectures: the names in config.json's `architectures`.
      read_config: config.json to a config; the caller checks that all fields were read.
      names: tensors of its safetensors files.
      gguf_architecture: its `general.architecture`; "" if there is no GGUF of it.
      read_gguf: the metadata below that name to a config; given whether the LM head is
        the embedding.
      gguf_names: tensors of its GGUF files.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[Fields], ModelConfig]
    names: Names
    gguf_architecture: str = ""
    read_gguf: Callable[[Fields, bool], ModelConfig] | None = None
    gguf_names: Names | None = None


def plus_one(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Gemma stores w where its norms multiply by 1 + w; in float32, since w is small."""
    return weight.astype(np.float32) + 1


def unpermute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Interleaved rotary pairs (0, 1), (2, 3), … back to halves, per head; [out, in]."""
    head_dim = weight.shape[0] // num_heads
    pairs = weight.reshape(num_heads, head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def entries(table: Mapping[str, str]) -> dict[str, Entry]:
    return {name: Entry(parameter) for name, parameter in table.items()}
