"""Qwen2 and 2.5 (biases on queries, keys and values) and dense Qwen3 (normalised heads)."""

from __future__ import annotations

from typing import Any

from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.families import gguf, hugging_face
from cartridges_jax.models.families.family import Family, Fields, entries


def _common(fields: Fields, **shapes_options: Any) -> dict[str, Any]:
    shapes = hugging_face.shapes(fields, **shapes_options)
    num_layers = shapes["num_layers"]
    rope = hugging_face.rope(fields, shapes["head_dim"])
    slides = bool(fields.take("use_sliding_window", False))
    first_local = fields.number("max_window_layers", 28, null=0)
    default = [
        hugging_face.LOCAL if slides and layer >= first_local else hugging_face.GLOBAL for layer in range(num_layers)
    ]
    types = hugging_face.layer_types(fields, num_layers, default)
    if not slides:
        fields.take("sliding_window", None)  # set in many files, and without effect
        types = [hugging_face.GLOBAL] * num_layers
    return {
        **shapes,
        "tie_embeddings": hugging_face.tied(fields, False),
        "period": hugging_face.period([LayerKind(rope, window) for window in hugging_face.windows(fields, types)]),
        "activation": hugging_face.activation(fields, "hidden_act", "silu"),
    }


def _qwen2(fields: Fields) -> ModelConfig:
    return ModelConfig(**_common(fields), qkv_bias=True)


def _qwen3(fields: Fields) -> ModelConfig:
    return ModelConfig(**_common(fields, head_dim=128), **hugging_face.biases(fields), qk_norm=True)


def _gguf_common(fields: Fields, tie_embeddings: bool) -> dict[str, Any]:
    shapes = gguf.shapes(fields)
    return {
        **shapes,
        "tie_embeddings": tie_embeddings,
        "period": (LayerKind(gguf.rope(fields, shapes["head_dim"])),),
    }


def _qwen2_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    return ModelConfig(**_gguf_common(fields, tie_embeddings), qkv_bias=True)


def _qwen3_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    return ModelConfig(**_gguf_common(fields, tie_embeddings), qk_norm=True)


FAMILIES = (
    Family(
        architectures=("Qwen2ForCausalLM",),
        read_config=_qwen2,
        names=hugging_face.NAMES,
        gguf_architecture="qwen2",
        read_gguf=_qwen2_gguf,
        gguf_names=gguf.NAMES.extended(
            layer=entries({"attn_q.bias": "q_bias", "attn_k.bias": "k_bias", "attn_v.bias": "v_bias"})
        ),
    ),
    Family(
        architectures=("Qwen3ForCausalLM",),
        read_config=_qwen3,
        names=hugging_face.NAMES.extended(
            layer=entries({"self_attn.q_norm.weight": "q_norm", "self_attn.k_norm.weight": "k_norm"})
        ),
        gguf_architecture="qwen3",
        read_gguf=_qwen3_gguf,
        gguf_names=gguf.NAMES.extended(layer=entries({"attn_q_norm.weight": "q_norm", "attn_k_norm.weight": "k_norm"})),
    ),
)
