"""The names under which a decoder's layers are in the parameter tree.

Layers are scanned by period, so that a layer's kind (its window, its rotation) is known
when the program is traced; layers after the last whole period follow unrolled. The
parameters of Gemma 3 with its 26 layers:

    layers/0 … layers/5   [4, …] each: position 0..5 of the four whole periods
    layer_24, layer_25    the two remaining layers
"""

from __future__ import annotations

from cartridges_jax.models.config import ModelConfig


def layer_name(layer: int) -> str:
    """The name of a layer that is in no stack."""
    return f"layer_{layer}"


def layer_path(config: ModelConfig, layer: int) -> tuple[tuple[str, ...], int | None]:
    """The place of a layer's loaded parameters: keys into the tree, and the index in the stack.

    The index is None for a layer after the last whole period, which has no stack.
    """
    period, number = divmod(layer, len(config.period))
    if period < config.num_layers // len(config.period):
        return ("layers", str(number)), period
    return (layer_name(layer),), None
