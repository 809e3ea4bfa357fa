"""SmolLM3: Llama in which every fourth layer leaves positions out (arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Sequence

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import LayerKind, ModelConfig
from cartridges_jax.models.families import gguf, hugging_face
from cartridges_jax.models.families.family import Family, Fields
from cartridges_jax.rope import Rope

_INTERVAL = 4


def _kinds(rope: Rope, rotated: Sequence[int], windows: Sequence[int]) -> tuple[LayerKind, ...]:
    return hugging_face.period(
        [LayerKind(rope if rotates else None, window) for rotates, window in zip(rotated, windows)]
    )


def _every(interval: int, num_layers: int) -> list[int]:
    return [int((layer + 1) % interval != 0) for layer in range(num_layers)]


def _smollm3(fields: Fields) -> ModelConfig:
    shapes = hugging_face.shapes(fields)
    num_layers = shapes["num_layers"]
    rope = hugging_face.rope(fields, shapes["head_dim"], 2_000_000.0)
    interval = fields.number("no_rope_layer_interval", _INTERVAL)
    rotated = fields.listing("no_rope_layers", _every(interval, num_layers))  # 1 means with positions
    if len(rotated) != num_layers:
        raise UserError(
            f"{fields.source} lists {len(rotated)} no_rope_layers for {num_layers} layers: fetch the model again"
        )
    slides = bool(fields.take("use_sliding_window", False)) and bool(fields.take("sliding_window", 0))
    default = [hugging_face.LOCAL if slides and not rotates else hugging_face.GLOBAL for rotates in rotated]
    types = hugging_face.layer_types(fields, num_layers, default)
    fields.take("max_window_layers", None)  # in its files, and not used by it
    if not slides:
        fields.take("sliding_window", None)
        types = [hugging_face.GLOBAL] * num_layers
    return ModelConfig(
        **shapes,
        **hugging_face.biases(fields),
        mlp_bias=hugging_face.mlp_bias(fields),
        tie_embeddings=hugging_face.tied(fields, True),
        period=_kinds(rope, rotated, hugging_face.windows(fields, types)),
        activation=hugging_face.activation(fields, "hidden_act", "silu"),
    )


def _from_gguf(fields: Fields, tie_embeddings: bool) -> ModelConfig:
    shapes = gguf.shapes(fields)
    rope = gguf.rope(fields, shapes["head_dim"])
    rotated = _every(_INTERVAL, shapes["num_layers"])  # as llama.cpp fixes it
    return ModelConfig(**shapes, tie_embeddings=tie_embeddings, period=_kinds(rope, rotated, [0] * len(rotated)))


FAMILIES = (
    Family(
        architectures=("SmolLM3ForCausalLM",),
        read_config=_smollm3,
        names=hugging_face.NAMES,
        gguf_architecture="smollm3",
        read_gguf=_from_gguf,
        gguf_names=gguf.PERMUTED_NAMES,
    ),
)
