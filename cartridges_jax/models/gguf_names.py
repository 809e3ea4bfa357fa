"""The name table from GGUF tensors to the decoder's parameters.

GGUF stores a linear layer as [out, in], and llama.cpp's converter permutes the rows of
Llama's query and key projections for interleaved rotary pairs; both are undone here.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import ModelConfig


class TensorFile(Protocol):
    """What is read from: `formats.gguf.GGUFFile`, or a test's own."""

    tensor_names: Any

    def read(self, name: str) -> np.ndarray: ...


def _as_is(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return weight


def _transposed(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return weight.T


def unpermute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Interleaved rotary pairs (0, 1), (2, 3), … back to halves, per head; [out, in]."""
    head_dim = weight.shape[0] // num_heads
    pairs = weight.reshape(num_heads, head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _queries(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return unpermute_rows(weight, config.num_heads).T


def _keys(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return unpermute_rows(weight, config.num_kv_heads).T


class _Entry(NamedTuple):
    parameter: str
    convert: Callable[[np.ndarray, ModelConfig], np.ndarray]


_TOP = {
    "token_embd.weight": _Entry("embedding", _as_is),
    "output_norm.weight": _Entry("final_norm", _as_is),
    "output.weight": _Entry("lm_head", _as_is),
}
_LAYER = {
    "attn_norm.weight": _Entry("attn_norm", _as_is),
    "attn_q.weight": _Entry("q_proj", _queries),
    "attn_k.weight": _Entry("k_proj", _keys),
    "attn_v.weight": _Entry("v_proj", _transposed),
    "attn_output.weight": _Entry("o_proj", _transposed),
    "ffn_norm.weight": _Entry("mlp_norm", _as_is),
    "ffn_gate.weight": _Entry("gate_proj", _transposed),
    "ffn_up.weight": _Entry("up_proj", _transposed),
    "ffn_down.weight": _Entry("down_proj", _transposed),
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")
# Derived values that converters add and the decoder computes itself.
_DERIVED = frozenset({"rope_freqs.weight"})


def params_from_gguf(file: TensorFile, config: ModelConfig, abstract: Any, dtype: Any) -> Any:
    """Reads every parameter, stacking the layers.

    Args:
      file: the tensors.
      config: the model they belong to.
      abstract: the tree to fill, from `decoder.abstract_params`.
      dtype: of the returned arrays.

    Raises:
      UserError: tensors without a parameter, parameters without a tensor, a wrong
        shape, or a value that is not finite.
    """
    wanted = {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    filled: dict[str, np.ndarray] = {}
    seen: set[tuple[str, int]] = set()
    unmapped: list[str] = []
    for name in file.tensor_names:
        if name in _DERIVED:
            continue
        match = _LAYER_NAME.fullmatch(name)
        entry = _LAYER.get(match[2]) if match else _TOP.get(name)
        layer = int(match[1]) if match else -1
        parameter = None if entry is None else ("layers/" if match else "") + entry.parameter
        if parameter not in wanted or (match and layer >= config.num_layers):
            unmapped.append(name)
            continue
        if (parameter, layer) in seen:
            raise UserError(f"tensor {name} occurs twice: the model file is damaged, fetch it again")
        seen.add((parameter, layer))
        raw = file.read(name)
        shape = wanted[parameter].shape[1:] if match else wanted[parameter].shape
        # Only linear layers are converted, and they are stored the other way round.
        stored_shape = shape if entry.convert is _as_is else shape[::-1]
        if raw.shape != stored_shape:
            raise UserError(f"tensor {name} has shape {raw.shape}, the model's config asks for {stored_shape}")
        value = entry.convert(raw, config)
        if not np.isfinite(value).all():
            raise UserError(f"tensor {name} holds values that are not finite: fetch the model again")
        if match:
            stacked = filled.setdefault(parameter, np.empty(wanted[parameter].shape, np.float32))
            stacked[layer] = value
        else:
            filled[parameter] = value
    if unmapped:
        raise UserError(f"{len(unmapped)} tensors have no place in the decoder, first {unmapped[0]}")
    for parameter in wanted:
        layers = range(config.num_layers) if parameter.startswith("layers/") else (-1,)
        missing = [layer for layer in layers if (parameter, layer) not in seen]
        if missing:
            raise UserError(f"the model file lacks {parameter} of layer {missing[0]}: fetch it again")

    tree: dict[str, Any] = {}
    for parameter in list(filled):
        *parents, leaf_name = parameter.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf_name] = jnp.asarray(filled.pop(parameter), dtype)
    return tree
