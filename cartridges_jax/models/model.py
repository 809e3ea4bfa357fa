"""A loaded model as the rest of the package uses it: decoder, parameters, tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.formats.safetensors_files import SafetensorsDirectory
from cartridges_jax.formats.sources import locate
from cartridges_jax.formats.tensors import TensorFile
from cartridges_jax.models.cache import Cache, empty_cache
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.families import Names, read_gguf_metadata, read_hugging_face_config
from cartridges_jax.models.sharding import param_shardings, params_on
from cartridges_jax.models.unstacked import runs_unstacked, unstack_layers
from cartridges_jax.models.weights import load_params
from cartridges_jax.text.chat import ChatTemplate
from cartridges_jax.text.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# How frozen matrices may be stored; "" is in the model's dtype.
WEIGHTS = ("", "int8", "bfloat16")
# In configs: the fastest on this machine.
AUTO = "auto"
# The processors' flags for products of bfloat16.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def chosen_weights(weights: str, dtype: str) -> str:
    """One of `WEIGHTS`: the given one, or for "auto" the fastest on this machine."""
    return fastest_weights(dtype) if weights == AUTO else weights


def fastest_weights(dtype: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The fastest storage of matrices on this machine: one of `WEIGHTS`.

    "bfloat16" under a float32 model on a CPU with instructions for such products: they
    take half the time. Else "".
    """
    if dtype != "float32" or jax.default_backend() != "cpu" or not cpuinfo.is_file():
        return ""
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return "bfloat16" if _BFLOAT16_FLAGS & set(flags.split()) else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      name: as the user gave it (registry name, path or hub id).
      config: shapes and constants.
      params: the frozen parameters as they were loaded, layers stacked: matrices in the model's dtype or quantised, norms
        and biases in float32.
      dtype: of the computation.
      tokenizer: text to token ids and back.
      chat: the chat template over that tokenizer.
      source_sha256: hash of the files the weights came from.
      mesh: the devices that they are spread over; None is one device.
    """

    name: str
    config: ModelConfig
    params: Any
    dtype: Any
    tokenizer: Tokenizer
    chat: ChatTemplate
    source_sha256: str = ""
    mesh: Mesh | None = None

    @functools.cached_property
    def decode_params(self) -> Any:
        """The parameters for decoding; on one CPU device the layers are unstacked."""
        return unstack_layers(self.params, self.config) if runs_unstacked(self.params) else self.params

    @property
    def _decodes_unstacked(self) -> bool:
        return self.decode_params is not self.params

    def reading_cache(self, num_rows: int, num_slots: int) -> Cache:
        """An empty cache of B rows and S slots for reading texts with `params`."""
        return empty_cache(self.config, num_rows, num_slots, self.dtype, mesh=self.mesh)

    def decoding_cache(self, num_rows: int, num_slots: int) -> Cache:
        """An empty cache of B rows and S slots, laid out for decoding with `decode_params`."""
        return empty_cache(
            self.config, num_rows, num_slots, self.dtype, unstacked=self._decodes_unstacked, mesh=self.mesh
        )

    def decoding_prefix(self, prefix: KVPrefix) -> KVPrefix:
        """A prefix in the model's dtype, on its devices, laid out for decoding with `decode_params`.

        It may also be read with `params`; the decoder stacks it for that.
        """
        bias = None if prefix.bias is None else jnp.asarray(prefix.bias, jnp.float32)
        placed = parallel.place_prefix(
            KVPrefix(
                keys=jnp.asarray(prefix.keys, self.dtype),
                values=jnp.asarray(prefix.values, self.dtype),
                positions=jnp.asarray(prefix.positions, jnp.int32),
                next_position=jnp.asarray(prefix.next_position, jnp.int32),
                bias=bias,
            ),
            self.mesh,
            in_use=True,
        )
        return placed.unstacked() if self._decodes_unstacked else placed

    def on(self, part: Mesh) -> Model:
        """This model on one of its mesh's `parallel.independent_parts`, of which this process has devices."""
        return dataclasses.replace(self, params=params_on(self.params, part), mesh=part)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over config and tokenizer; a cartridge only fits the same one."""
        both = self.config.fingerprint() + self.tokenizer.fingerprint
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of everything that decides the token ids."""
        return self.tokenizer.fingerprint

    @functools.cached_property
    def chat_template_sha256(self) -> str:
        """Hash of the chat template's source."""
        return hashlib.sha256(self.chat.source.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Opened:
    """The parsed description of a model's files, whose tensors are not loaded yet."""

    file: TensorFile
    names: Names
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatTemplate


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    weights: str = "",
    thinking: bool = False,
    windows_see_prefix: bool = True,
    accept_license: bool = False,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a model.

    Args:
      source: a registry name ("smollm2-135m-instruct"), a GGUF file, a directory that
        holds one, a Hugging Face directory, or a hub id ("org/name").
      dtype: "float32" or "bfloat16", of the parameters and the computation.
      weights: "int8" stores the matrices in 8 bits a weight, "bfloat16" under a float32 model
        in 16; "" in `dtype`.
      thinking: lets models that can think before they answer do so.
      windows_see_prefix: False lets layers with a sliding window see a whole prefix.
      accept_license: accepts the terms of a registry model that has its own.
      mesh: the devices to spread it over (see `parallel`); None is the default device.

    Raises:
      UserError: no such model, a damaged file, or an unsupported architecture, field or
        dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise UserError(f"weights {weights!r}: choose 'int8', 'bfloat16', or '' for the model's dtype")
    if weights == dtype == "bfloat16":
        raise UserError("weights 'bfloat16' belongs to a float32 model: with dtype 'bfloat16' leave it ''")
    path = locate(source, accept_license=accept_license)
    opened = _open_directory(path, thinking) if path.is_dir() else _open_gguf(path, thinking)
    config = dataclasses.replace(opened.config, windows_see_prefix=windows_see_prefix)
    params = load_params(
        opened.file,
        opened.names,
        config,
        DTYPES[dtype],
        stored=weights,
        sharding_of=None if mesh is None else param_shardings(config, mesh),
    )
    return Model(
        name=source,
        config=config,
        params=params,
        dtype=jnp.dtype(DTYPES[dtype]),
        tokenizer=opened.tokenizer,
        chat=opened.chat,
        source_sha256=opened.file.sha256(),
        mesh=mesh,
    )


def _require_fit(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
            "they do not belong together, fetch the model again"
        )


def _open_gguf(path: Path, thinking: bool) -> _Opened:
    file = GGUFFile(path)
    names = file.tensor_names
    rope_freqs = tuple(file.read("rope_freqs.weight").tolist()) if "rope_freqs.weight" in names else ()
    family, config = read_gguf_metadata(
        file.metadata, tie_embeddings="output.weight" not in names, rope_freqs=rope_freqs
    )
    tokenizer = tokenizer_from_gguf(file)
    _require_fit(path, tokenizer, config)
    return _Opened(file, family.gguf_names, config, tokenizer, ChatTemplate.from_gguf(file, tokenizer, thinking))


def _open_directory(path: Path, thinking: bool) -> _Opened:
    file = SafetensorsDirectory(path)
    family, config = read_hugging_face_config(file.config)
    tokenizer = tokenizer_from_directory(path, num_rows=config.vocab_size)
    _require_fit(path, tokenizer, config)
    stops = _stop_ids(file, config)
    chat = ChatTemplate.from_directory(path, tokenizer, thinking, stop_ids=stops)
    return _Opened(file, family.names, config, tokenizer, chat)


def _stop_ids(file: SafetensorsDirectory, config: ModelConfig) -> list[int]:
    """The ids that end an answer by generation_config.json, or by config.json where that is silent.

    Raises:
      UserError: one is no token of the model.
    """
    found, source = None, "generation_config.json"
    if file.generation_config is not None:
        found = file.generation_config.get("eos_token_id")
    if found is None:
        found, source = file.config.get("eos_token_id"), "config.json"
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
            raise UserError(
                f"{file.path / source}: eos_token_id {token_id!r} is none of the model's {config.vocab_size} tokens; "
                "correct it or fetch the file again"
            )
    return ids
