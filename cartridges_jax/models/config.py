"""The description of a decoder. Every field changes what the model computes."""
from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from cartridges_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a Llama-style decoder.

    Attributes:
      num_layers: L.
      d_model: D.
      num_heads: N.
      num_kv_heads: K, divides N.
      head_dim: H.
      d_ff: width of the gated feed-forward layer.
      vocab_size: V.
      context_length: longest position the model was trained for, in tokens.
      rope_base: wavelength base of the rotary embedding.
      norm_eps: added to the mean square in RMSNorm.
      tie_embeddings: the LM head is the embedding.
    """

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    rope_base: float
    norm_eps: float
    tie_embeddings: bool

    def fingerprint(self) -> str:
        """sha256 of the fields, for telling one model's cartridges from another's."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()


def config_from_gguf(metadata: dict[str, Any], tie_embeddings: bool) -> ModelConfig:
    """Reads the config out of a GGUF file's metadata (keys of the GGUF specification).

    Raises:
      UserError: an architecture, or a setting of it, that the decoder does not have.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"GGUF architecture {architecture!r} is not supported: use a 'llama' model")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", ""):
        raise UserError(f"GGUF rope scaling {scaling!r} is not supported: use a model without it")

    def field(name: str) -> Any:
        if f"llama.{name}" not in metadata:
            raise UserError(f"the GGUF file lacks llama.{name}: convert the model again")
        return metadata[f"llama.{name}"]

    num_heads, d_model = field("attention.head_count"), field("embedding_length")
    return ModelConfig(
        num_layers=field("block_count"),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
        head_dim=metadata.get("llama.attention.key_length", d_model // num_heads),
        d_ff=field("feed_forward_length"),
        vocab_size=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
        context_length=field("context_length"),
        rope_base=float(metadata.get("llama.rope.freq_base", 10000.0)),
        norm_eps=float(field("attention.layer_norm_rms_epsilon")),
        tie_embeddings=tie_embeddings,
    )
