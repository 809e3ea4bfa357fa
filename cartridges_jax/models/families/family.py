"""A family of models: the reading of its config and the names of its tensors.

To add one, write a module like its neighbours (a `Family`, or several), and list it in
`families/__init__.py`; docs/models.md has the steps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import ModelConfig

_REQUIRED = object()
# Fields of a config.json that describe a model, its training or its use and change nothing about the forward pass:
# those of transformers' PretrainedConfig and GenerationConfig, of older versions too.
_DESCRIPTIVE = frozenset({
    # PretrainedConfig
    "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "custom_pipelines", "dtype",
    "experts_implementation", "finetuning_task", "gradient_checkpointing", "id2label", "is_composition", "is_decoder",
    "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "language", "license",
    "model_max_length", "model_type", "name_or_path", "num_labels", "output_attentions", "output_hidden_states",
    "output_logits", "output_past", "output_scores", "output_router_logits", "prefix", "pretraining_tp",
    "problem_type", "return_dict", "return_dict_in_generate", "seq_length", "max_seq_len", "max_seq_length",
    "max_sequence_length", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tie_last_hidden_states",
    "tokenizer_class", "processor_class", "tokenizer_model_max_length", "torch_dtype", "torchscript",
    "use_bfloat16", "use_cache", "use_flash_attn", "use_flash_attention_2", "use_return_dict", "use_mtp",
    "xla_device", "num_logits_to_keep", "mm_tokens_per_image",
    # GenerationConfig
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "bad_words_ids", "begin_suppress_tokens", "cache_config", "cache_implementation", "compile_config", "constraints",
    "continuous_batching_config", "disable_compile", "diversity_penalty", "do_sample", "dola_layers",
    "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "forced_decoder_ids", "generation_config", "guidance_scale",
    "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size",
    "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences",
    "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "sequence_bias", "speculation_type", "stop_strings",
    "suppress_tokens", "target_lookbehind", "temperature", "token_healing", "top_h", "top_k", "top_p",
    "typical_p", "watermarking_config",
})  # fmt: skip
# The same by the shape of their names: private ones, ids of tokens, dropout and other settings of training, versions.
_DESCRIPTIVE_NAMES = re.compile(
    r"_.*|.*_token_(id|ids|index)|(.*_)?(dropout|pdrop|drop)(_.*)?|(.*_)?(loss|aux_loss|z_loss|initializer|init)_\w+"
    r"|initializer_\w+|(.*_)?version|(transformers|unsloth|quanto|axolotl)\W?_?.*"
)
# Names of factors: 1 changes nothing there. Elsewhere 0 is the number that turns something off.
_FACTOR = re.compile(r"factor|scale|scaling|multiplier|mult(_|$)")
# Switches that are on in every decoder here: on is neutral, off is not.
_ALWAYS_ON = re.compile(
    r"(.*[._])?(is_)?causal|use_rope|use_rotary\w*|rotary|use_pos(itional)?_?emb\w*|scale_attn_weights|use_rms_?norm"
)


def is_descriptive(name: str) -> bool:
    """Returns whether a field of config.json changes nothing about the forward pass, whatever its value."""
    return name in _DESCRIPTIVE or _DESCRIPTIVE_NAMES.fullmatch(name) is not None


def is_neutral(name: str, value: Any) -> bool:
    """Returns whether a field at this value asks for nothing: a switch that is off, a factor of 1, null, []."""
    if isinstance(value, bool):
        return value == (_ALWAYS_ON.fullmatch(name) is not None)
    if isinstance(value, (int, float, np.number)):
        return value == (1 if _FACTOR.search(name) else 0)
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


class Fields:
    """A config's fields by name, with a record of which were read, so that none with an effect is ignored.

    Attributes:
      source: what errors call the config: "config.json" or "GGUF metadata llama.*".
    """

    def __init__(
        self, values: Mapping[str, Any], source: str, descriptive: Callable[[str], bool] | None = is_descriptive
    ):
        self.source = source
        self._values = values
        self._read: set[str] = set()
        self._descriptive = descriptive or (lambda name: False)

    def take(self, name: str, default: Any = _REQUIRED, *, null: Any = _REQUIRED) -> Any:
        """The value of a field.

        Args:
          default: the value where the field is absent.
          null: the value where it is null; `default` unless given.

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
        """A positive number; `default` and `null` may be anything, and where one is 0 so may the value be.

        Raises:
          UserError: it is no such number.
        """
        value = self.take(name, default, null=null)
        if value is default or value is null:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            per_layer = ", a number for every layer," if isinstance(value, (list, tuple)) else ","
            raise UserError(f"{self.source} has {name}={value!r:.60}{per_layer} where one positive number is supported")
        if value == 0 and any(other == 0 for other in (default, null) if other is not _REQUIRED and other is not None):
            return kind(0)
        if not (0 < value < math.inf) or (kind is int and value != int(value)):
            whole = "whole number" if kind is int else "number"
            raise UserError(f"{self.source} has {name}={value!r:.60}, where one positive {whole} is supported")
        return kind(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """A field that holds an object; {} where it is absent or null.

        Raises:
          UserError: it holds something else.
        """
        value = self.take(name, {})
        if not isinstance(value, Mapping):
            raise UserError(f"{self.source} has {name}={value!r:.60}, which is no JSON object: fetch the model again")
        return dict(value)

    def listing(self, name: str, default: Sequence[Any]) -> list[Any]:
        """A field that holds a list.

        Raises:
          UserError: it holds something else.
        """
        value = self.take(name, default)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{self.source} has {name}={value!r:.60}, which is no list: fetch the model again")
        return list(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses any value but the allowed ones (the first is the default): others change the computation.

        Raises:
          UserError: another value.
        """
        value = self.take(name, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise UserError(f"{self.source} has {name}={value!r:.60}, which is not supported (only {choices})")

    def finish(self) -> None:
        """Refuses fields that were not read, unless they describe the model only or ask for nothing.

        Raises:
          UserError: there is one; the message names it.
        """
        unread = sorted(
            name
            for name, value in self._values.items()
            if name not in self._read and not self._descriptive(name) and not is_neutral(name, value)
        )
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


class Part(NamedTuple):
    """A part of a fused tensor: the end of its own name, and the number of its rows."""

    name: str
    rows: Callable[[ModelConfig], int]


@dataclasses.dataclass(frozen=True)
class Names:
    """The table from a file's tensors to parameters.

    Attributes:
      top: tensors outside the layers.
      layer: tensors of a layer, by what follows its number.
      layer_prefix: pattern of the text before a layer's tensor, the number its group.
      ignored: pattern of tensors that hold nothing to load.
      renames: (pattern, replacement) pairs for the beginnings of names.
      fused: by the end of its name, the parts of a tensor that holds several, in the order of its rows.
    """

    top: Mapping[str, Entry]
    layer: Mapping[str, Entry]
    layer_prefix: str
    ignored: str = r"(?!)"
    renames: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[Part, ...]] = dataclasses.field(default_factory=dict)

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
    """Models that are described and stored in the same way.

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
