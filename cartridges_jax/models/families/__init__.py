"""The families of models, one module each, and the lookup of the family that a file describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.families import gemma, granite, llama, olmo2, phi3, qwen, smollm3
from cartridges_jax.models.families.family import Entry, Family, Fields, Names

__all__ = ["Entry", "FAMILIES", "Family", "Fields", "Names", "read_gguf_metadata", "read_hugging_face_config"]

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES, *qwen.FAMILIES, *gemma.FAMILIES, *smollm3.FAMILIES, *granite.FAMILIES, *olmo2.FAMILIES,
    *phi3.FAMILIES,
)  # fmt: skip

# Parts of architecture names that tell why they are refused; the rest is merely unknown.
_REASONS = {
    "moe": "it is a mixture of experts",
    "mixtral": "it is a mixture of experts",
    "mamba": "its state is not a cache of keys and values",
    "rwkv": "its state is not a cache of keys and values",
    "next": "its linear-attention layers keep no cache of keys and values",
    "gemma3n": "its layers share keys and values",
    "deepseek": "it compresses keys and values",
}


def read_hugging_face_config(values: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and config that a config.json describes.

    Raises:
      UserError: an unknown architecture, or a field that the decoder does not implement.
    """
    names = values.get("architectures") or []
    if not isinstance(names, list):
        names = [names]
    family = next((f for f in FAMILIES if names and names[0] in f.architectures), None)
    if family is None:
        known = ", ".join(name for f in FAMILIES for name in f.architectures)
        raise _unknown("config.json", names[0] if names else None, known)
    fields = Fields(values, "config.json")
    config = family.read_config(fields)
    fields.finish()
    _require_whole_heads(config, "config.json")
    return family, config


def read_gguf_metadata(
    metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_freqs: tuple[float, ...] = ()
) -> tuple[Family, ModelConfig]:
    """The family and config that a GGUF file's metadata describes.

    Args:
      tie_embeddings: the file has no LM head of its own.
      rope_freqs: the file's tensor of rotary factors, if it has one.

    Raises:
      UserError: as `read_hugging_face_config`.
    """
    architecture = metadata.get("general.architecture")
    family = next((f for f in FAMILIES if f.gguf_architecture and f.gguf_architecture == architecture), None)
    if family is None:
        raise _unknown("GGUF", architecture, ", ".join(f.gguf_architecture for f in FAMILIES if f.gguf_architecture))
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"the GGUF is one of {metadata['split.count']} parts: join them (llama-gguf-split --merge)")
    head = f"{architecture}."
    values = {key.removeprefix(head): metadata[key] for key in metadata if key.startswith(head)}
    if "vocab_size" not in values and "tokenizer.ggml.tokens" in metadata:
        values["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    # The layout is undone by the family's table; "finetuned" says nothing, except in Granite, which reads it.
    descriptive = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})
    fields = Fields({**values, "rope_freqs": rope_freqs}, f"GGUF metadata {head}*", descriptive.__contains__)
    config = family.read_gguf(fields, tie_embeddings)
    fields.finish()
    _require_whole_heads(config, f"GGUF metadata {head}*")
    return family, config


def _require_whole_heads(config: ModelConfig, source: str) -> None:
    """Refuses head counts and widths that no attention can be computed with."""
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{source} has {config.num_heads} attention heads for {config.num_kv_heads} key/value heads, which do not "
            "divide them: fetch or convert the model again"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{source} has heads of width {config.head_dim}, which rotary positions cannot pair: fetch the model again"
        )


def _unknown(source: str, architecture: Any, known: str) -> UserError:
    lowered = str(architecture).lower()
    why = next((f" ({reason})" for part, reason in _REASONS.items() if part in lowered), "")
    return UserError(f"{source} architecture {architecture!r} is not supported{why}: use one of {known}")
