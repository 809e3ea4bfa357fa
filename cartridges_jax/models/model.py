"""A model as the rest of the package takes it: decoder, parameters and text side."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import jax.numpy as jnp

from cartridges_jax.errors import UserError
from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.formats.sources import locate
from cartridges_jax.models.config import ModelConfig, config_from_gguf
from cartridges_jax.models.decoder import Decoder, abstract_params
from cartridges_jax.models.gguf_names import params_from_gguf
from cartridges_jax.text.chat import ChatTemplate
from cartridges_jax.text.tokenizer import Tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      name: what the user called it (registry name or path).
      config: shapes and constants.
      params: the frozen parameters, in their own dtype.
      tokenizer: text to token ids and back.
      chat: the chat template over that tokenizer.
      source_sha256: hash of the file the weights came from.
    """

    name: str
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    chat: ChatTemplate
    source_sha256: str = ""

    @property
    def dtype(self) -> jnp.dtype:
        return self.params["embedding"].dtype

    @functools.cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over config and tokenizer; a cartridge only fits the same one."""
        both = self.config.fingerprint() + self.tokenizer.fingerprint
        return hashlib.sha256(both.encode()).hexdigest()


def load_model(source: str, *, dtype: str = "float32") -> Model:
    """Loads a model.

    Args:
      source: a registry name ("smollm2-135m-instruct"), a GGUF file, or a directory
        that holds one.
      dtype: "float32" or "bfloat16", of the parameters and the computation.

    Raises:
      UserError: no such model, a damaged file, or an unsupported architecture or dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    file = GGUFFile(locate(source))
    config = config_from_gguf(file.metadata, tie_embeddings="output.weight" not in file.tensor_names)
    tokenizer = Tokenizer.from_gguf(file)
    return Model(
        name=source,
        config=config,
        params=params_from_gguf(file, config, abstract_params(config), DTYPES[dtype]),
        tokenizer=tokenizer,
        chat=ChatTemplate.from_gguf(file, tokenizer),
        source_sha256=file.sha256(),
    )
