"""Llama 2, 3, 3.1 and 3.2, SmolLM2, and Mistral, which is Llama with a sliding window."""

from __future__ import annotations

from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.families import gguf, hugging_face
from cartridges_jax.models.families.family import Family, Fields


def _llama(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields)
    rope = hugging_face.rope(fields, shapes["head_dim"])
    # SmolLM2's files name settings of the framework that trained it.
    for name in ("is_llama_config", "rope_interleaved", "transformers.js_config"):
        fields.take(name, None)
    return ModelConfig(
        **shapes,
        **hugging_face.biases(fields),
        mlp_bias=hugging_face.mlp_bias(fields),
        tie_embeddings=hugging_face.tied(fields, False),
        period=(LayerKind(rope),),
        activation=hugging_face.activation(fields, "hidden_act", "silu"),
    )


def _mistral(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields)
    rope = hugging_face.rope(fields, shapes["head_dim"])
    return ModelConfig(
        **shapes,
        tie_embeddings=hugging_face.tied(fields, False),
        # Absent means the first version's window, null none.
        period=(LayerKind(rope, fields.number("sliding_window", 4096, null=0)),),
        activation=hugging_face.activation(fields, "hidden_act", "silu"),
    )


def _from_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    shapes = gguf.shapes(fields)
    return ModelConfig(
        **shapes,
        tie_embeddings=tie_embeddings,
        period=(LayerKind(gguf.rope(fields, shapes["head_dim"]), fields.number("attention.sliding_window", 0)),),
    )


FAMILIES = (
    Family(
        architectures=("LlamaForCausalLM",),
        read_config=_llama,
        names=hugging_face.NAMES,
        gguf_architecture="llama",
        read_gguf=_from_gguf,
        gguf_names=gguf.PERMUTED_NAMES,
    ),
    # llama.cpp stores Mistral as "llama".
    Family(architectures=("MistralForCausalLM",), read_config=_mistral, names=hugging_face.NAMES),
)
