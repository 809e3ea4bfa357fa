"""OLMo 2 (arXiv 2501.00656): normalised outputs instead of inputs, queries and keys normalised over all heads."""

from __future__ import annotations

from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.families import gguf, hugging_face
from cartridges_jax.models.families.family import Family, Fields, entries


def _olmo2(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields)
    fields.expect("clip_qkv", None)  # OLMo 1
    return ModelConfig(
        **{**shapes, "norm_eps": fields.number("rms_norm_eps", 1e-5, kind=float)},
        **hugging_face.biases(fields),
        tie_embeddings=hugging_face.tied(fields, False),
        period=(LayerKind(hugging_face.rope(fields, shapes["head_dim"])),),
        activation=hugging_face.activation(fields, "hidden_act", "silu"),
        pre_norms=False,
        post_norms=True,
        qk_norm=True,
        qk_norm_joint=True,
    )


def _from_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    shapes = gguf.shapes(fields)
    return ModelConfig(
        **shapes,
        tie_embeddings=tie_embeddings,
        period=(LayerKind(gguf.rope(fields, shapes["head_dim"])),),
        pre_norms=False,
        post_norms=True,
        qk_norm=True,
        qk_norm_joint=True,
    )


FAMILIES = (
    Family(
        architectures=("Olmo2ForCausalLM",),
        read_config=_olmo2,
        names=hugging_face.NAMES.extended(
            layer=entries(
                {
                    "post_attention_layernorm.weight": "post_attn_norm",
                    "post_feedforward_layernorm.weight": "post_mlp_norm",
                    "self_attn.q_norm.weight": "q_norm",
                    "self_attn.k_norm.weight": "k_norm",
                }
            )
        ),
        gguf_architecture="olmo2",
        read_gguf=_from_gguf,
        gguf_names=gguf.NAMES.extended(
            layer=entries(
                {
                    "post_attention_norm.weight": "post_attn_norm",
                    "post_ffw_norm.weight": "post_mlp_norm",
                    "attn_q_norm.weight": "q_norm",
                    "attn_k_norm.weight": "k_norm",
                }
            )
        ),
    ),
)
