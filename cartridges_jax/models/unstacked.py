"""Parameters with separate arrays for every layer.

A scan reads its layer out of the stack. XLA's CPU backend copies the layer first, which
for the few tokens of a decode step costs as much as the products. There the decoder runs
unrolled, over views of the stack: nothing is stored twice. Reading or training on many
tokens gains nothing by it and compiles longer, so those use the stack.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.decoder import lm_head
from cartridges_jax.models.layout import layer_name, layer_path
from cartridges_jax.quantized import Narrow


def unstack_layers(params: Any, config: ModelConfig) -> Any:
    """Returns parameters with which `Decoder` runs unrolled.

    Args:
      params: with stacked layers, each on one CPU device or in NumPy; stays valid.

    Returns:
      The same with layer_0 … layer_{L-1} instead of "layers", which share their memory
      with the stacks wherever a layer begins at an address that JAX can use. Narrow
      matrices are bfloat16 arrays, but for the table that tokens are looked up in.
    """
    tree = {name: part for name, part in params.items() if name != "layers"}
    head = lm_head(params, config)
    if isinstance(head, Narrow):
        tree["lm_head"] = jax.tree.map(lambda leaf: _view(leaf, ...), head)
    for layer in range(config.num_layers):
        parents, index = layer_path(config, layer)
        if index is not None:
            stack = params[parents[0]][parents[1]]
            tree[layer_name(layer)] = jax.tree.map(lambda leaf: _view(leaf, index), stack)  # noqa: B023
    return tree


def _view(stack: Array, index: Any) -> Array:
    part = np.asarray(stack)[index]
    if part.dtype == np.uint16:
        part = part.view(jnp.bfloat16)
    return jax.device_put(part, stack.device, may_alias=True)


def runs_unstacked(params: Any) -> bool:
    """True if a model decodes fastest unrolled: all of it is on one CPU device, and on no mesh, even of one."""
    return all(
        isinstance(leaf, Array)
        and isinstance(leaf.sharding, SingleDeviceSharding)
        and next(iter(leaf.devices())).platform == "cpu"
        for leaf in jax.tree.leaves(params)
    )
