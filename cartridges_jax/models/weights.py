"""From the tensors of a model file to parameters on devices, a block at a time.

Every device's shard of every parameter is allocated once and filled in place, in blocks
of rows, so that the host never holds more than a block beside the shards: a layer's
tensor goes straight to its place in the stack, and with a sharding only the slices that
local devices own are read. Files hold matrices as [out, in]; the decoder as [in, out].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from cartridges_jax.errors import UserError
from cartridges_jax.formats.tensors import TensorFile
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.decoder import abstract_params
from cartridges_jax.models.families import Entry, Names
from cartridges_jax.models.families.fused import without_fused
from cartridges_jax.models.layout import layer_path
from cartridges_jax.quantized import Matrix, Narrow, Quantized, channel_scale

# Values that are copied from the file to a device at a time.
_BLOCK_VALUES = 2**23
# Stored as they are used; other matrices are transposed.
_TABLES = ("embedding", "lm_head")

# (parameter's path, its shape) to its placement.
ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]


def load_params(
    file: TensorFile,
    names: Names,
    config: ModelConfig,
    dtype: Any,
    *,
    stored: str = "",
    sharding_of: ShardingOf | None = None,
) -> Any:
    """Reads every parameter.

    Args:
      file: the tensors.
      names: its family's table.
      config: the model they belong to.
      dtype: of matrices, and of the computation with them.
      stored: how matrices are stored if not in `dtype`: "int8" or "bfloat16" (see `quantized`).
      sharding_of: where each parameter goes; the default device if not given.

    Raises:
      UserError: tensors without a parameter, parameters without a tensor, a wrong
        shape, or a value that is not finite; before the first parameter is returned.
    """
    abstract = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config, dtype))}
    file = without_fused(file, names, config)
    sources = _match(file, names, config, abstract)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree: dict[str, Any] = {}
    for path, leaf in abstract.items():
        sharding = sharding_of(path, leaf.shape) if sharding_of else device
        tensors = [_Tensor(file, name, entry, config) for name, entry in sources[path]]
        node = tree
        for parent in path[:-1]:
            node = node.setdefault(parent, {})
        node[path[-1]] = _fill(tensors, leaf, sharding, path, stored)
    return tree


def abstract_loaded(config: ModelConfig, dtype: Any, *, stored: str = "", sharding_of: ShardingOf | None = None) -> Any:
    """The result of `load_params` as shapes, for programs that are compiled without weights."""

    def leaf(keys: Any, declared: jax.ShapeDtypeStruct) -> Any:
        path, shape = _path(keys), declared.shape
        where = sharding_of(path, shape) if sharding_of else None
        if not (stored and _is_matrix(path, declared)):
            return jax.ShapeDtypeStruct(shape, declared.dtype, sharding=where)
        if stored == "bfloat16":
            return Narrow(jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=where))
        summed = _summed_axis(path, declared)
        return Quantized(
            jax.ShapeDtypeStruct(shape, jnp.int8, sharding=where),
            jax.ShapeDtypeStruct(
                shape[:summed] + shape[summed + 1 :], declared.dtype, sharding=_without_axis(where, summed, len(shape))
            ),
        )

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config, dtype))


def _path(keys: Any) -> tuple[str, ...]:
    return tuple(key.key for key in keys)


def _is_matrix(path: tuple[str, ...], leaf: Any) -> bool:
    return leaf.ndim - _is_stacked(path) == 2


def _is_transposed(path: tuple[str, ...], leaf: Any) -> bool:
    """Whether it is a matrix that files store transposed."""
    return _is_matrix(path, leaf) and path[-1] not in _TABLES


def _summed_axis(path: tuple[str, ...], leaf: Any) -> int:
    """The axis of a matrix that its products sum over."""
    return leaf.ndim - 2 if _is_transposed(path, leaf) else leaf.ndim - 1


def _is_stacked(path: tuple[str, ...]) -> bool:
    return path[0] == "layers"


def _match(
    file: TensorFile, names: Names, config: ModelConfig, abstract: dict[tuple[str, ...], Any]
) -> dict[tuple[str, ...], list[tuple[str, Entry]]]:
    """Per parameter the tensors that fill it, in the order of its stack; reads no values.

    Raises:
      UserError: as `load_params`, for names and shapes.
    """
    found: dict[tuple[tuple[str, ...], int | None], tuple[str, Entry]] = {}
    unmapped: list[str] = []
    for name in file.tensor_names:
        try:
            place = names.place(name)
        except KeyError:
            unmapped.append(name)
            continue
        if place is None or (place[0].parameter == "lm_head" and config.tie_embeddings):
            continue
        entry, layer = place
        if layer is not None and layer >= config.num_layers:
            unmapped.append(name)
            continue
        parents, index = ((), None) if layer is None else layer_path(config, layer)
        path = (*parents, entry.parameter)
        if path not in abstract:
            unmapped.append(name)
            continue
        if (path, index) in found:
            raise UserError(f"tensor {name} occurs twice: the model file is damaged, fetch it again")
        leaf = abstract[path]
        shape = leaf.shape if index is None else leaf.shape[1:]
        stored = shape[::-1] if _is_transposed(path, leaf) else shape
        if tuple(file.shape(name)) != stored:
            raise UserError(f"tensor {name} has shape {tuple(file.shape(name))}, the model's config asks for {stored}")
        found[path, index] = (name, entry)
    if unmapped:
        raise UserError(f"{len(unmapped)} tensors have no place in the decoder, first {unmapped[0]}")
    sources = {}
    for path, leaf in abstract.items():
        indices = range(leaf.shape[0]) if _is_stacked(path) else [None]
        missing = [index for index in indices if (path, index) not in found]
        if missing and path == ("lm_head",):
            raise UserError(
                "the model file lacks lm_head, and its config has tie_word_embeddings=false: set that to true if the "
                "head is the embedding, else fetch the model again"
            )
        if missing:
            raise UserError(f"the model file lacks {_described(config, path, missing[0])}: fetch it again")
        sources[path] = [found[path, index] for index in indices]
    return sources


def _described(config: ModelConfig, path: tuple[str, ...], index: int | None) -> str:
    for layer in range(config.num_layers):
        if (path[:-1], index) == layer_path(config, layer):
            return f"{path[-1]} of layer {layer}"
    return path[-1]


class _Tensor:
    """One tensor of a file, read in blocks of its stored rows."""

    def __init__(self, file: TensorFile, name: str, entry: Entry, config: ModelConfig):
        self._file, self._name, self._entry, self._config = file, name, entry, config
        self.shape = tuple(file.shape(name))

    def blocks(self, rows: slice, columns: tuple[slice, ...]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, block) until all of `rows` were read, each with these `columns` only.

        Raises:
          UserError: a value that is not finite.
        """
        adapted = None
        if self._entry.adapt is not None:
            # An adapter may permute rows, so it needs them all; only small or GGUF tensors are adapted.
            adapted = self._entry.adapt(self._file.read(self._name), self._config)
        step = max(1, _BLOCK_VALUES // int(np.prod(self.shape[1:])))
        for first in range(rows.start, rows.stop, step):
            index = (slice(first, min(first + step, rows.stop)), *columns)
            block = self._file.read(self._name, index) if adapted is None else adapted[index]
            if not np.isfinite(block).all():
                raise UserError(f"tensor {self._name} holds values that are not finite: fetch the model again")
            yield first, block


def _fill(
    tensors: list[_Tensor], leaf: jax.ShapeDtypeStruct, sharding: Sharding, path: tuple[str, ...], stored: str
) -> Matrix:
    """One parameter, shard by shard; `tensors` in the order of its stack."""
    transposed, stacked = _is_transposed(path, leaf), _is_stacked(path)
    is_matrix = _is_matrix(path, leaf)
    int8, narrow = is_matrix and stored == "int8", is_matrix and stored == "bfloat16"
    # A tensor's rows are the channels of its products; the other axis is summed over.
    row_axis = leaf.ndim - 1 if transposed else int(stacked)
    summed = _summed_axis(path, leaf)
    shards, scales = [], []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True)]
        sizes = [part.stop - part.start for part in bounds]
        shard = jnp.zeros(sizes, jnp.int8 if int8 else jnp.uint16 if narrow else leaf.dtype, device=device)
        scale = np.zeros([size for axis, size in enumerate(sizes) if axis != summed], np.float32) if int8 else None
        for layer in range(bounds[0].start, bounds[0].stop) if stacked else (0,):
            start = (layer - bounds[0].start,) if stacked else ()
            columns = tuple(part for axis, part in enumerate(bounds[stacked:], int(stacked)) if axis != row_axis)
            # A channel's scale is that of the whole channel, whichever part of it this shard has.
            for first, block in tensors[layer].blocks(bounds[row_axis], () if int8 else columns):
                offset = first - bounds[row_axis].start
                if int8:
                    block = block.astype(np.float32)
                    block_scale = channel_scale(block)
                    scale[(*start, slice(offset, offset + len(block)))] = block_scale
                    block = np.rint(block / block_scale[:, None])[(slice(None), *columns)]
                where = (*start, 0, offset) if transposed else (*start, offset, *(0,) * len(columns))
                block = block.T if transposed else block
                block = block.astype(jnp.bfloat16).view(np.uint16) if narrow else block.astype(shard.dtype)
                shard = _put(shard, jax.device_put(block.reshape((1,) * stacked + block.shape), device), where)
        shards.append(shard)
        if int8:
            scales.append(jax.device_put(scale.astype(leaf.dtype), device))
    values = jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)
    if narrow:
        return Narrow(values)
    if not int8:
        return values
    scale_shape = tuple(size for axis, size in enumerate(leaf.shape) if axis != summed)
    return Quantized(
        values,
        jax.make_array_from_single_device_arrays(scale_shape, _without_axis(sharding, summed, leaf.ndim), scales),
    )


@functools.partial(jax.jit, donate_argnums=0)
def _put(shard: Array, block: Array, where: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_update_slice(shard, block, where)


def _without_axis(sharding: Sharding | None, axis: int, ndim: int) -> Sharding | None:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
