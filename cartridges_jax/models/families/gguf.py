"""GGUF metadata and tensor names that all families share.

Names and defaults follow the GGUF specification and llama.cpp's `convert_hf_to_gguf.py`.
GGUF stores a linear layer as [out, in], and the converter permutes the rows of Llama's
query and key projections for interleaved rotary pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.families.family import Entry, Fields, Names, entries, unpermute_rows
from cartridges_jax.rope import Rope, linear_factors

NAMES = Names(
    top=entries({"token_embd.weight": "embedding", "output_norm.weight": "final_norm", "output.weight": "lm_head"}),
    layer=entries(
        {
            "attn_norm.weight": "attn_norm",
            "attn_q.weight": "q_proj",
            "attn_k.weight": "k_proj",
            "attn_v.weight": "v_proj",
            "attn_output.weight": "o_proj",
            "ffn_norm.weight": "mlp_norm",
            "ffn_gate.weight": "gate_proj",
            "ffn_up.weight": "up_proj",
            "ffn_down.weight": "down_proj",
        }
    ),
    layer_prefix=r"blk\.(\d+)\.",
    # Rotary factors belong to the config, see `rope`.
    ignored=r"rope_freqs\.weight",
)


def _queries(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return unpermute_rows(weight, config.num_heads)


def _keys(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return unpermute_rows(weight, config.num_kv_heads)


PERMUTED_NAMES = NAMES.extended(
    layer={"attn_q.weight": Entry("q_proj", _queries), "attn_k.weight": Entry("k_proj", _keys)}
)


def shapes(fields: Fields) -> dict[str, Any]:
    """The fields of `ModelConfig` that every family has.

    Raises:
      UserError: a field is missing, or keys and values differ in width.
    """
    num_heads, d_model = fields.number("attention.head_count"), fields.number("embedding_length")
    head_dim = fields.number("attention.key_length", d_model // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        fields.expect(name, head_dim)
    fields.expect("expert_count", 0)
    fields.expect("expert_used_count", 0)
    return {
        "num_layers": fields.number("block_count"),
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": fields.number("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "d_ff": fields.number("feed_forward_length"),
        "vocab_size": fields.number("vocab_size"),
        "context_length": fields.number("context_length"),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon", kind=float),
    }


def rope(fields: Fields, head_dim: int, default_base: float = 10000.0) -> Rope:
    """The rotation; factors per pair (Llama 3.1) come from the tensor `rope_freqs.weight`.

    Raises:
      UserError: a kind of scaling that is not implemented.
    """
    base = fields.number("rope.freq_base", default_base, kind=float)
    factors = tuple(float(factor) for factor in fields.take("rope_freqs", ()))
    if factors and len(factors) != head_dim // 2:
        raise UserError(
            f"rope_freqs.weight has {len(factors)} values for heads of width {head_dim}: convert the model again"
        )
    kind = fields.take("rope.scaling.type", "none")
    if kind == "linear" and not factors:
        factors = linear_factors(head_dim, fields.number("rope.scaling.factor", kind=float))
    elif kind != "none":
        raise UserError(
            f"{fields.source} asks for rope scaling {kind!r}, which is not implemented: use a model without it"
        )
    return Rope(base, factors)
