"""The placement of a model's parameters on a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from cartridges_jax import parallel
from cartridges_jax.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.decoder import param_axes
from cartridges_jax.models.weights import ShardingOf


def param_shardings(config: ModelConfig, mesh: Mesh) -> ShardingOf:
    """Returns the sharding of each parameter, from the axes that the decoder annotates.

    A parameter's axis over heads is split between groups of heads, never within one:
    where the mesh does not divide the key/value heads, attention is replicated, the query
    heads of a group along with their key/value head.

    Raises:
      UserError: the mesh's tensor axis divides nothing of the model.
    """
    tensor = mesh.shape["tensor"]
    if tensor > 1 and all(size % tensor for size in (config.num_kv_heads, config.d_ff, config.vocab_size)):
        raise UserError(
            f"tensor:{tensor} divides neither the model's {config.num_kv_heads} key/value heads nor its feed-forward "
            f"width {config.d_ff} nor its vocabulary {config.vocab_size}: choose another size, or data and fsdp instead"
        )
    axes = param_axes(config)
    heads = {"heads": config.num_kv_heads, "kv_heads": config.num_kv_heads}

    def sharding_of(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        sizes = [heads.get(name, size) for name, size in zip(axes[path], shape, strict=True)]
        return parallel.sharding(mesh, axes[path], sizes)

    return sharding_of


def params_on(params: Any, part: Mesh) -> Any:
    """Parameters on a part of their mesh that holds all of them; nothing is copied."""
    devices = set(part.devices.flat)

    def here(leaf: Array) -> Array:
        where = NamedSharding(part, leaf.sharding.spec)
        shards = [shard.data for shard in leaf.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, where, shards)

    return jax.tree.map(here, params)


def undivided(config: ModelConfig, mesh: Mesh) -> list[str]:
    """Messages about the parts of a model that the mesh does not divide and replicates instead."""
    found = []
    for name, size, words in (
        ("kv_heads", config.num_kv_heads, f"{config.num_heads} query and {config.num_kv_heads} key/value heads"),
        ("mlp", config.d_ff, f"feed-forward width of {config.d_ff}"),
        ("vocab", config.vocab_size, f"vocabulary of {config.vocab_size}"),
        ("embed", config.d_model, f"width of {config.d_model}"),
    ):
        (axis,) = parallel.RULES[name].at_rest
        if size % mesh.shape[axis]:
            found.append(f"{axis}:{mesh.shape[axis]} does not divide the model's {words}: every device has all of it")
    return found
