"""Phi-3, 3.5 and 4: Llama with fused projections (arXiv 2404.14219), a window and LongRoPE in some.

A model with LongRoPE has the context of its short factors here, see `hugging_face.rope_of`.
"""

from __future__ import annotations

from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.families import gguf, hugging_face
from cartridges_jax.models.families.family import Family, Fields, Part


def _phi3(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields)
    rope = hugging_face.rope(fields, shapes["head_dim"])
    # LongRoPE reads it; without LongRoPE it repeats the context.
    fields.take("original_max_position_embeddings", None)
    # Of Phi-4-mini's files; every layer sees the same window.
    fields.expect("full_attn_mod", None, 1)
    return ModelConfig(
        **{**shapes, "norm_eps": fields.number("rms_norm_eps", 1e-5, kind=float)},
        tie_embeddings=hugging_face.tied(fields, False),
        period=(LayerKind(rope, fields.number("sliding_window", 0)),),
        activation=hugging_face.activation(fields, "hidden_act", "silu"),
    )


def _from_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    shapes = gguf.shapes(fields)
    return ModelConfig(
        **shapes,
        tie_embeddings=tie_embeddings,
        period=(LayerKind(gguf.rope(fields, shapes["head_dim"]), fields.number("attention.sliding_window", 0)),),
    )


def _query_rows(config: ModelConfig) -> int:
    return config.num_heads * config.head_dim


def _key_rows(config: ModelConfig) -> int:
    return config.num_kv_heads * config.head_dim


def _mlp_rows(config: ModelConfig) -> int:
    return config.d_ff


FAMILIES = (
    Family(
        architectures=("Phi3ForCausalLM",),
        read_config=_phi3,
        names=hugging_face.NAMES.extended(
            fused={
                "self_attn.qkv_proj.weight": (
                    Part("self_attn.q_proj.weight", _query_rows),
                    Part("self_attn.k_proj.weight", _key_rows),
                    Part("self_attn.v_proj.weight", _key_rows),
                ),
                "mlp.gate_up_proj.weight": (
                    Part("mlp.gate_proj.weight", _mlp_rows),
                    Part("mlp.up_proj.weight", _mlp_rows),
                ),
            }
        ),
        gguf_architecture="phi3",
        read_gguf=_from_gguf,
        gguf_names=gguf.NAMES.extended(
            fused={
                "attn_qkv.weight": (
                    Part("attn_q.weight", _query_rows),
                    Part("attn_k.weight", _key_rows),
                    Part("attn_v.weight", _key_rows),
                ),
                "ffn_up.weight": (Part("ffn_gate.weight", _mlp_rows), Part("ffn_up.weight", _mlp_rows)),
            }
        ),
    ),
)
