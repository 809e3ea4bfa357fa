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
from cartridges_jax.rope import Rope, linear_factors, yarn_factors, yarn_scale

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
    head_dim = fields.number("attention.key_length", None)
    if head_dim is None and d_model % num_heads:
        raise UserError(
            f"{fields.source} has embedding_length={d_model}, which attention.head_count={num_heads} does not divide, "
            "and no attention.key_length: convert the model again"
        )
    head_dim = head_dim or d_model // num_heads
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
        "context_length": _context_length(fields),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon", kind=float),
    }


def _scaling(fields: Fields) -> tuple[str, float]:
    """(kind, factor); without a kind a factor is linear, and old files name it `rope.scale_linear`."""
    old = fields.number("rope.scale_linear", 1.0, null=0.0, kind=float)
    factor = fields.number("rope.scaling.factor", old, null=0.0, kind=float) or 1.0
    kind = fields.take("rope.scaling.type", "linear")
    return ("none", 1.0) if kind == "linear" and factor == 1 else (kind, factor)


def _context_length(fields: Fields) -> int:
    """The longest position; llama.cpp's converter leaves it unscaled in some models with YaRN."""
    longest = fields.number("context_length")
    kind, factor = _scaling(fields)
    if kind != "yarn":
        return longest
    return max(longest, int(fields.number("rope.scaling.original_context_length", longest) * factor))


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
    kind, factor = _scaling(fields)
    original = fields.number("rope.scaling.original_context_length", fields.number("context_length"))
    if kind == "linear" and not factors:
        return Rope(base, linear_factors(head_dim, factor))
    if kind == "yarn" and not factors and base > 1:
        fast = fields.number("rope.scaling.yarn_beta_fast", 32.0, kind=float)
        slow = fields.number("rope.scaling.yarn_beta_slow", 1.0, kind=float)
        factors = yarn_factors(head_dim, base, factor, original, beta_fast=fast, beta_slow=slow)
        scale = yarn_scale(factor) * fields.number("rope.scaling.attn_factor", 1.0, kind=float)
        return Rope(base, factors, scale)
    if kind != "none":
        raise UserError(
            f"{fields.source} asks for rope scaling {kind!r}, which is not implemented: use a model without it"
        )
    return Rope(base, factors)
