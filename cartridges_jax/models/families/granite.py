"""Granite 3 (dense): Llama with a factor on embeddings, attention scores, every layer's halves and the logits."""

from __future__ import annotations

from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.families import gguf, hugging_face
from cartridges_jax.models.families.family import Family, Fields


def _granite(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields)
    rope = hugging_face.rope(fields, shapes["head_dim"])
    return ModelConfig(
        **shapes,
        **hugging_face.biases(fields),
        mlp_bias=hugging_face.mlp_bias(fields),
        tie_embeddings=hugging_face.tied(fields, False),
        period=(LayerKind(rope),),
        activation=hugging_face.activation(fields, "hidden_act", "silu"),
        embedding_scale=fields.number("embedding_multiplier", 1.0, kind=float),
        attention_scale=fields.number("attention_multiplier", 1.0, kind=float),
        residual_scale=fields.number("residual_multiplier", 1.0, kind=float),
        logit_scale=1 / fields.number("logits_scaling", 1.0, kind=float),
    )


def _from_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    shapes = gguf.shapes(fields)
    # llama.cpp leaves positions out where this is False; for other families it says nothing.
    fields.expect("rope.scaling.finetuned", True)
    return ModelConfig(
        **shapes,
        tie_embeddings=tie_embeddings,
        period=(LayerKind(gguf.rope(fields, shapes["head_dim"])),),
        embedding_scale=fields.number("embedding_scale", 1.0, kind=float),
        attention_scale=fields.number("attention.scale", None, kind=float),
        residual_scale=fields.number("residual_scale", 1.0, kind=float),
        # What logits are divided by, despite its name.
        logit_scale=1 / fields.number("logit_scale", kind=float),
    )


FAMILIES = (
    Family(
        architectures=("GraniteForCausalLM",),
        read_config=_granite,
        names=hugging_face.NAMES,
        gguf_architecture="granite",
        read_gguf=_from_gguf,
        gguf_names=gguf.PERMUTED_NAMES,
    ),
)
