"""The config.json fields and safetensors names that all families share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import LayerKind, shortest_period
from cartridges_jax.models.families.family import Fields, Names, entries
from cartridges_jax.rope import Rope, linear_factors, llama3_factors, yarn_factors, yarn_scale

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# More is a damaged file, and lists of that length would be built.
_MOST_LAYERS, _WIDEST_HEAD = 10_000, 65_536
LOCAL, GLOBAL = "sliding_attention", "full_attention"

NAMES = Names(
    top=entries(
        {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm", "lm_head.weight": "lm_head"}
    ),
    layer=entries(
        {
            "input_layernorm.weight": "attn_norm",
            "self_attn.q_proj.weight": "q_proj",
            "self_attn.k_proj.weight": "k_proj",
            "self_attn.v_proj.weight": "v_proj",
            "self_attn.o_proj.weight": "o_proj",
            "self_attn.q_proj.bias": "q_bias",
            "self_attn.k_proj.bias": "k_bias",
            "self_attn.v_proj.bias": "v_bias",
            "self_attn.o_proj.bias": "o_bias",
            "post_attention_layernorm.weight": "mlp_norm",
            "mlp.gate_proj.weight": "gate_proj",
            "mlp.up_proj.weight": "up_proj",
            "mlp.down_proj.weight": "down_proj",
            "mlp.gate_proj.bias": "gate_bias",
            "mlp.up_proj.bias": "up_bias",
            "mlp.down_proj.bias": "down_bias",
        }
    ),
    layer_prefix=r"model\.layers\.(\d+)\.",
    # Old Llama checkpoints hold the rotary frequencies that the config gives.
    ignored=r".*rotary_emb\.inv_freq",
)


def shapes(fields: Fields, *, head_dim: int | None = None) -> dict[str, Any]:
    """The fields of `ModelConfig` that every family has.

    Args:
      head_dim: H where the file does not say; D / N by default.

    Raises:
      UserError: a field is missing or out of bounds, or N does not divide D where H follows from them.
    """
    num_heads, d_model = fields.number("num_attention_heads"), fields.number("hidden_size")
    num_layers = fields.number("num_hidden_layers")
    if num_layers > _MOST_LAYERS:
        raise UserError(f"{fields.source} has num_hidden_layers={num_layers}: fetch the model again")
    head_dim = fields.number("head_dim", head_dim)
    if head_dim is None and d_model % num_heads:
        raise UserError(
            f"{fields.source} has hidden_size={d_model}, which num_attention_heads={num_heads} does not divide, and no "
            "head_dim: fetch the model again"
        )
    head_dim = head_dim or d_model // num_heads
    if not 0 < head_dim <= _WIDEST_HEAD:
        raise UserError(f"{fields.source} has attention heads of width {head_dim}: fetch the model again")
    fields.expect("quantization_config", None)
    return {
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": fields.number("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "d_ff": fields.number("intermediate_size"),
        "vocab_size": fields.number("vocab_size"),
        "context_length": _context_length(fields),
        "norm_eps": fields.number("rms_norm_eps", 1e-6, kind=float),
    }


def _context_length(fields: Fields) -> int:
    """The longest position: what the file says, stretched by YaRN, or where LongRoPE's short factors end."""
    longest = fields.number("max_position_embeddings")
    given = Fields(_rope_parameters(fields), f"{fields.source} rope_parameters", None)
    kind = _rope_type(given)
    if kind == "yarn":
        factor = given.number("factor", 1.0, kind=float)
        return max(longest, int(_original_context(fields, given) * factor))
    return min(longest, _original_context(fields, given)) if kind == "longrope" else longest


def activation(fields: Fields, name: str, default: str) -> str:
    value = fields.take(name, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise UserError(
            f"{fields.source} has {name}={value!r}, which is not supported (only {', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[value]


def rope(fields: Fields, head_dim: int, default_base: float = 10000.0) -> Rope:
    """The rotation, as older files (`rope_theta`, `rope_scaling`) or newer ones (`rope_parameters`) give it."""
    base = fields.number("rope_theta", default_base, kind=float)
    return rope_of(fields, {"rope_theta": base, **_rope_parameters(fields)}, head_dim)


def _rope_parameters(fields: Fields) -> dict[str, Any]:
    return {**fields.mapping("rope_scaling"), **fields.mapping("rope_parameters")}


def _rope_type(given: Fields) -> Any:
    kind = given.take("rope_type", given.take("type", "default"))
    return "longrope" if kind == "su" else kind  # the name in the first Phi-3 files


def _original_context(fields: Fields, given: Fields) -> int:
    """The context before it was stretched; Phi-3 states it outside the dictionary, and that one counts."""
    longest = fields.number("max_position_embeddings")
    inside = given.number("original_max_position_embeddings", longest)
    original = fields.number("original_max_position_embeddings", inside)
    if original < 2:
        raise UserError(f"{fields.source} has original_max_position_embeddings={original}: fetch the model again")
    return original


def rope_of(fields: Fields, parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """One rotation out of the dictionary that describes it (transformers' modeling_rope_utils.py).

    Two kinds depend on the length of the text in transformers, which computes other rotations past a limit. Keys of a
    prefix are rotated once, so here the limit is the model's context: `dynamic` is unscaled up to
    `max_position_embeddings`, and `longrope` has its short factors up to `original_max_position_embeddings`.

    Raises:
      UserError: a kind of scaling that is not implemented, or factors that do not fit the head.
    """
    given = Fields(parameters, f"{fields.source} rope_parameters", None)
    kind = _rope_type(given)
    base = given.number("rope_theta", kind=float)
    if base <= 1:
        raise UserError(f"{fields.source} has rope_theta={base}, which must be above 1: fetch the model again")
    # transformers 5 writes it into the dictionary, and the dictionary counts.
    part = given.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0, kind=float), kind=float)
    width = int(head_dim * part)
    if part > 1 or width < 2 or width % 2:
        raise UserError(
            f"{fields.source} has partial_rotary_factor={part}, which makes no even part of heads of width {head_dim}: "
            "fetch the model again"
        )
    factors: tuple[float, ...] = ()
    scale = 1.0
    if kind == "linear":
        factors = linear_factors(width, given.number("factor", kind=float))
        given.take("original_max_position_embeddings", None)
    elif kind == "dynamic":
        given.number("factor", kind=float)
        given.take("original_max_position_embeddings", None)
    elif kind == "llama3":
        low, high = given.number("low_freq_factor", kind=float), given.number("high_freq_factor", kind=float)
        if low >= high:
            raise UserError(f"{given.source} has low_freq_factor={low}, which must be below high_freq_factor={high}")
        factors = llama3_factors(
            width,
            base,
            factor=given.number("factor", kind=float),
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=_original_context(fields, given),
        )
    elif kind == "yarn":
        factors, scale = _yarn(fields, given, width, base)
    elif kind == "longrope":
        factors, scale = _longrope(fields, given, width)
    elif kind != "default":
        raise UserError(
            f"{fields.source} asks for rope scaling {kind!r}, which is not implemented (only linear, dynamic, yarn, "
            "longrope and llama3): use a model without it, or remove it from the file to keep to the unscaled context"
        )
    given.finish()
    return Rope(base, factors, scale, 0 if width == head_dim else width)


def _yarn(fields: Fields, given: Fields, width: int, base: float) -> tuple[tuple[float, ...], float]:
    original = _original_context(fields, given)
    factor = given.number("factor", fields.number("max_position_embeddings") / original, kind=float)
    mscale, mscale_all = given.number("mscale", 0.0, kind=float), given.number("mscale_all_dim", 0.0, kind=float)
    scale = yarn_scale(factor)
    if mscale and mscale_all:
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all)
    factors = yarn_factors(
        width,
        base,
        factor,
        original,
        beta_fast=given.number("beta_fast", 32.0, kind=float),
        beta_slow=given.number("beta_slow", 1.0, kind=float),
        truncate=bool(given.take("truncate", True)),
    )
    return factors, given.number("attention_factor", scale, kind=float)


def _longrope(fields: Fields, given: Fields, width: int) -> tuple[tuple[float, ...], float]:
    original = _original_context(fields, given)
    factor = given.number("factor", fields.number("max_position_embeddings") / original, kind=float)
    given.take("long_factor", None)
    factors = given.listing("short_factor", ())
    numbers = [f for f in factors if isinstance(f, (int, float)) and not isinstance(f, bool) and 0 < f < math.inf]
    if len(numbers) != len(factors) or len(factors) != width // 2:
        raise UserError(
            f"{fields.source} has short_factor={factors!r:.60}, where {width // 2} positive numbers are needed: fetch "
            "the model again"
        )
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return tuple(map(float, factors)), given.number("attention_factor", scale, kind=float)


def period(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    return shortest_period(list(kinds))


def layer_types(fields: Fields, num_layers: int, default: Sequence[str]) -> list[str]:
    """Per layer `LOCAL` or `GLOBAL`.

    Raises:
      UserError: another kind, or a list of another length.
    """
    types = fields.listing("layer_types", default)
    if len(types) != num_layers:
        raise UserError(
            f"{fields.source} lists {len(types)} layer_types for {num_layers} layers: fetch the model again"
        )
    for layer, kind in enumerate(types):
        if kind not in (LOCAL, GLOBAL):
            raise UserError(
                f"{fields.source} has a layer of type {kind!r} (layer {layer}), which is not supported: its state is "
                "no block of keys and values that a cartridge could replace"
            )
    return types


def windows(fields: Fields, types: Sequence[str], default: int = 0) -> list[int]:
    """Per layer its window, 0 for layers that see everything.

    Raises:
      UserError: there are local layers and no window.
    """
    window = fields.number("sliding_window", default, null=0)
    if LOCAL in types and not window:
        raise UserError(f"{fields.source} has sliding layers but no sliding_window: fetch the model again")
    return [window if kind == LOCAL else 0 for kind in types]


def biases(fields: Fields) -> dict[str, bool]:
    """`attention_bias` gives all four projections one."""
    biased = bool(fields.take("attention_bias", False))
    return {"qkv_bias": biased, "o_bias": biased}


def mlp_bias(fields: Fields) -> bool:
    return bool(fields.take("mlp_bias", False))


def tied(fields: Fields, default: bool) -> bool:
    return bool(fields.take("tie_word_embeddings", default))
