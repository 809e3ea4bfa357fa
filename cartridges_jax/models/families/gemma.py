"""Gemma 2 (arXiv 2408.00118) and the text side of Gemma 3 (arXiv 2503.19786).

Local layers with a window alternate with global ones; embeddings are scaled by sqrt(D);
norms multiply by 1 + w and surround each half of a layer. GGUF files hold
1 + w already. A Gemma 3 with a vision part is read without it.
"""

from __future__ import annotations

import math
from typing import Any

from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.families import gguf, hugging_face
from cartridges_jax.models.families.family import Entry, Family, Fields, entries, plus_one
from cartridges_jax.models.families.hugging_face import GLOBAL, LOCAL
from cartridges_jax.rope import Rope

_NORMS = {
    "input_layernorm.weight": Entry("attn_norm", plus_one),
    "post_attention_layernorm.weight": Entry("post_attn_norm", plus_one),
    "pre_feedforward_layernorm.weight": Entry("mlp_norm", plus_one),
    "post_feedforward_layernorm.weight": Entry("post_mlp_norm", plus_one),
}
_HEAD_NORMS = {
    "self_attn.q_norm.weight": Entry("q_norm", plus_one),
    "self_attn.k_norm.weight": Entry("k_norm", plus_one),
}
_GGUF_NORMS = entries({"post_attention_norm.weight": "post_attn_norm", "post_ffw_norm.weight": "post_mlp_norm"})
_NAMES = hugging_face.NAMES.extended(top={"model.norm.weight": Entry("final_norm", plus_one)}, layer=_NORMS)
_LOCAL_BASE = 10_000.0


def _types(num_layers: int, every: int) -> list[str]:
    return [LOCAL if (layer + 1) % every else GLOBAL for layer in range(num_layers)]


def _common(fields: Fields, shapes: dict[str, Any]) -> dict[str, Any]:
    fields.take("hidden_act", None)  # the older name of hidden_activation, and not what is computed with
    fields.expect("use_bidirectional_attention", False)
    return {
        **shapes,
        **hugging_face.biases(fields),
        "tie_embeddings": hugging_face.tied(fields, True),
        "activation": hugging_face.activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        "post_norms": True,
        "embedding_scale": math.sqrt(shapes["d_model"]),
        "attention_scale": fields.number("query_pre_attn_scalar", 256, kind=float) ** -0.5,
    }


def _gemma2(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields, head_dim=256)
    rope = hugging_face.rope(fields, shapes["head_dim"])
    types = hugging_face.layer_types(fields, shapes["num_layers"], _types(shapes["num_layers"], 2))
    windows = hugging_face.windows(fields, types, 4096)
    return ModelConfig(
        **_common(fields, shapes),
        period=hugging_face.period([LayerKind(rope, window) for window in windows]),
        attention_softcap=fields.number("attn_logit_softcapping", 50.0, null=0.0, kind=float),
        logit_softcap=fields.number("final_logit_softcapping", 30.0, null=0.0, kind=float),
    )


# What the files of the models with a vision part leave out (transformers' Gemma3TextConfig).
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}  # fmt: skip


def _gemma3(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields, head_dim=256)
    num_layers, head_dim = shapes["num_layers"], shapes["head_dim"]
    parameters = Fields(fields.mapping("rope_parameters"), f"{fields.source} rope_parameters", None)
    ropes = {
        GLOBAL: {
            "rope_theta": fields.number("rope_theta", 1_000_000.0, kind=float),
            **fields.mapping("rope_scaling"),
            **parameters.mapping(GLOBAL),
        },
        LOCAL: {
            "rope_theta": fields.number("rope_local_base_freq", _LOCAL_BASE, kind=float),
            **parameters.mapping(LOCAL),
        },
    }
    parameters.finish()
    # Newer files file the pattern under the first name, and give the list as well.
    every = fields.number("_sliding_window_pattern", 6)
    every = fields.number("sliding_window_pattern", every)
    types = hugging_face.layer_types(fields, num_layers, _types(num_layers, every))
    kinds = [
        LayerKind(hugging_face.rope_of(fields, ropes[kind], head_dim), window)
        for kind, window in zip(types, hugging_face.windows(fields, types, 4096))
    ]
    return ModelConfig(
        **_common(fields, shapes),
        period=hugging_face.period(kinds),
        qk_norm=True,
        attention_softcap=fields.number("attn_logit_softcapping", 0.0, kind=float),
        logit_softcap=fields.number("final_logit_softcapping", 0.0, kind=float),
    )


def _gemma3_with_vision(fields: Fields) -> ModelConfig:
    text = Fields({**_GEMMA3_DEFAULTS, **fields.mapping("text_config")}, f"{fields.source} text_config")
    fields.take("vision_config", None)
    fields.take("tie_word_embeddings", None)
    config = _gemma3(text)
    text.finish()
    return config


def _scale(shapes: dict[str, Any], largest: int) -> float:
    """The family's largest model divides by D / N instead of H (as llama.cpp fixes it)."""
    width = shapes["d_model"] / shapes["num_heads"] if shapes["num_layers"] == largest else shapes["head_dim"]
    return width**-0.5


def _gguf_common(fields: Fields, shapes: dict[str, Any], tie_embeddings: bool) -> dict[str, Any]:
    return {
        **shapes,
        "tie_embeddings": tie_embeddings,
        "activation": "gelu_tanh",
        "post_norms": True,
        "embedding_scale": math.sqrt(shapes["d_model"]),
        "attention_softcap": fields.number("attn_logit_softcapping", 0.0, kind=float),
        "logit_softcap": fields.number("final_logit_softcapping", 0.0, kind=float),
    }


def _gemma2_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    shapes = gguf.shapes(fields)
    rope, window = gguf.rope(fields, shapes["head_dim"]), fields.number("attention.sliding_window", 4096)
    return ModelConfig(
        **_gguf_common(fields, shapes, tie_embeddings),
        period=(LayerKind(rope, window), LayerKind(rope)),
        attention_scale=_scale(shapes, largest=46),
    )


def _gemma3_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    shapes = gguf.shapes(fields)
    everywhere = LayerKind(gguf.rope(fields, shapes["head_dim"], 1_000_000.0))
    local = LayerKind(
        Rope(fields.number("rope.freq_base_swa", _LOCAL_BASE, kind=float)), fields.number("attention.sliding_window")
    )
    every = fields.number("attention.sliding_window_pattern", 6)
    return ModelConfig(
        **_gguf_common(fields, shapes, tie_embeddings),
        period=(local,) * (every - 1) + (everywhere,),
        qk_norm=True,
        attention_scale=_scale(shapes, largest=62),
    )


FAMILIES = (
    Family(
        architectures=("Gemma2ForCausalLM",),
        read_config=_gemma2,
        names=_NAMES,
        gguf_architecture="gemma2",
        read_gguf=_gemma2_gguf,
        gguf_names=gguf.NAMES.extended(layer=_GGUF_NORMS),
    ),
    Family(
        architectures=("Gemma3ForCausalLM", "Gemma3TextForCausalLM"),
        read_config=_gemma3,
        names=_NAMES.extended(layer=_HEAD_NORMS),
        gguf_architecture="gemma3",
        read_gguf=_gemma3_gguf,
        gguf_names=gguf.NAMES.extended(
            layer={**_GGUF_NORMS, **entries({"attn_q_norm.weight": "q_norm", "attn_k_norm.weight": "k_norm"})}
        ),
    ),
    Family(
        architectures=("Gemma3ForConditionalGeneration",),
        read_config=_gemma3_with_vision,
        # "language_model.model.layers…" in older files, "model.language_model.layers…" in newer ones.
        names=_NAMES.extended(
            layer=_HEAD_NORMS,
            ignored=r".*(vision_tower|multi_modal_projector)\..*",
            renames=((r"language_model\.", ""), (r"model\.language_model\.", "model.")),
        ),
    ),
)
