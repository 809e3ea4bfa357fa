"""The config.json fields and safetensors names that all families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import LayerKind, shortest_period
from cartridges_jax.models.families.family import Fields, Names, entries
from cartridges_jax.rope import Rope, linear_factors, llama3_factors

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
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
    """
    num_heads, d_model = fields.number("num_attention_heads"), fields.number("hidden_size")
    fields.expect("quantization_config", None)
    fields.expect("mlp_bias", False)
    return {
        "num_layers": fields.number("num_hidden_layers"),
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": fields.number("num_key_value_heads", num_heads),
        "head_dim": fields.number("head_dim", head_dim or d_model // num_heads),
        "d_ff": fields.number("intermediate_size"),
        "vocab_size": fields.number("vocab_size"),
        "context_length": fields.number("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6, kind=float),
    }


def activation(fields: Fields, name: str, default: str) -> str:
    value = fields.take(name, default)
    if value not in _ACTIVATIONS:
        raise UserError(
            f"{fields.source} has {name}={value!r}, which is not supported (only {', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[value]


def rope(fields: Fields, head_dim: int, context: int, default_base: float = 10000.0) -> Rope:
    """The rotation, as older files (`rope_theta`, `rope_scaling`) or newer ones (`rope_parameters`) give it."""
    base = fields.number("rope_theta", default_base, kind=float)
    parameters = {**fields.take("rope_scaling", {}), **fields.take("rope_parameters", {})}
    return rope_of(fields, {"rope_theta": base, **parameters}, head_dim, context)


def rope_of(fields: Fields, parameters: Mapping[str, Any], head_dim: int, context: int) -> Rope:
    """One rotation out of the dictionary that describes it.

    Raises:
      UserError: a kind of scaling that is not implemented.
    """
    given = Fields(parameters, f"{fields.source} rope_parameters", frozenset())
    kind = given.take("rope_type", given.take("type", "default"))
    base = given.number("rope_theta", kind=float)
    # transformers 5 files it here; 1 turns the whole head.
    given.expect("partial_rotary_factor", 1.0)
    factors: tuple[float, ...] = ()
    if kind == "linear":
        factors = linear_factors(head_dim, given.number("factor", kind=float))
        given.take("original_max_position_embeddings", None)
    elif kind == "llama3":
        factors = llama3_factors(
            head_dim,
            base,
            factor=given.number("factor", kind=float),
            low_freq_factor=given.number("low_freq_factor", kind=float),
            high_freq_factor=given.number("high_freq_factor", kind=float),
            original_context=given.number("original_max_position_embeddings", context),
        )
    elif kind != "default":
        raise UserError(
            f"{fields.source} asks for rope scaling {kind!r}, which is not implemented (only linear and llama3): "
            "use a model without it, or remove it from the file to keep to the unscaled context"
        )
    given.finish()
    return Rope(base, factors)


def period(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    return shortest_period(list(kinds))


def layer_types(fields: Fields, num_layers: int, default: Sequence[str]) -> list[str]:
    """Per layer `LOCAL` or `GLOBAL`.

    Raises:
      UserError: another kind, or a list of another length.
    """
    types = list(fields.take("layer_types", default))
    if len(types) != num_layers:
        raise UserError(
            f"{fields.source} lists {len(types)} layer_types for {num_layers} layers: fetch the model again"
        )
    for layer, kind in enumerate(types):
        if kind not in (LOCAL, GLOBAL):
            raise UserError(
                f"{fields.source} has a layer of type {kind!r} (layer {layer}), which is not supported: its state is "
                "no block of keys and values that a cartridge could stand in for"
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


def tied(fields: Fields, default: bool) -> bool:
    return bool(fields.take("tie_word_embeddings", default))
