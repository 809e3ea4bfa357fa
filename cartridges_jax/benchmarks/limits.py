"""What the arithmetic and the memory traffic of a model cost at least.

A multiplication and an addition count as two operations. Only matrix products are
counted: norms, rotations, softmax and activations are below two percent of them at the
sizes measured here. N, K, H, D, F, V, L, P as in `models.config` and `cartridge`.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cartridges_jax.models import ModelConfig
from cartridges_jax.quantized import Narrow, num_bytes


def layer_matmul_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """[in, out] of the seven weight matrices of a layer."""
    D, F, H = config.d_model, config.d_ff, config.head_dim
    wide, narrow = config.num_heads * H, config.num_kv_heads * H
    return [(D, wide), (D, narrow), (D, narrow), (wide, D), (D, F), (D, F), (F, D)]


def layer_weights(config: ModelConfig) -> int:
    """Numbers in the weight matrices of one layer: 2 D N H + 2 D K H + 3 D F."""
    return sum(rows * columns for rows, columns in layer_matmul_shapes(config))


def distillation_flops(config: ModelConfig, lengths: Sequence[int], num_targets: int, num_slots: int) -> int:
    """Operations of one distillation step on a cartridge.

    With W = `layer_weights`, T = sum of the conversations' lengths, M target rows:

        weights    L * T * 2 W      forward, and the same again to carry the gradient
                                    back through them; the weights are frozen, so
                                    they have no gradient of their own
        attention  L * S * 4 N H    forward (scores, mixture), and twice that backward
                                    (towards probabilities, values, queries, keys)
        head       M * 2 D V        forward, and the same again backward

        where S = sum over conversations of (P * t + t (t + 1) / 2): how many keys the
        tokens see, prefix and own, themselves included.

    Padding, recomputation and products with masked keys are not counted: they are work
    that an implementation adds. The bottom layer needs no gradient towards its inputs;
    it is counted like the others (below 1/L too much).
    """
    tokens = sum(lengths)
    seen = sum(num_slots * t + t * (t + 1) // 2 for t in lengths)
    weights = 2 * config.num_layers * tokens * 2 * layer_weights(config)
    attention = 3 * config.num_layers * seen * 4 * config.num_heads * config.head_dim
    head = 2 * num_targets * 2 * config.d_model * config.vocab_size
    return weights + attention + head


def decode_flops(config: ModelConfig, num_rows: int, seen: float) -> float:
    """Operations of one decode step of B rows that see `seen` keys each (prefix and own)."""
    weights = config.num_layers * 2 * layer_weights(config) + 2 * config.d_model * config.vocab_size
    attention = config.num_layers * 4 * config.num_heads * config.head_dim * seen
    return num_rows * (weights + attention)


def kv_bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def decode_bytes(
    config: ModelConfig, params: Any, kv_dtype: Any, num_rows: int, shared_slots: int, own_slots: float
) -> float:
    """Bytes that one decode step must read: weights and the shared prefix once, each row's own slots.

    A head that is not tied leaves the embedding table unread but for B rows of it.
    """
    weights = num_bytes(params)
    if not config.tie_embeddings:
        weights -= num_bytes(params["embedding"])
    return weights + kv_bytes_per_token(config, kv_dtype) * (shared_slots + num_rows * own_slots)


def multiplied_in(params: Any) -> str:
    """The dtype of the operands in products with a model's weights: "bfloat16" or "float32"."""
    narrow = any(isinstance(leaf, Narrow) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Narrow)))
    return "bfloat16" if narrow else "float32"


def flops_per_second(machine: dict[str, Any], multiplied_in: str) -> float:
    """What products reached on the machine, by the dtype of their operands."""
    return machine["matmul_gflops" if multiplied_in == "float32" else "matmul_bfloat16_gflops"] * 1e9


def step_seconds_at_least(
    flops: float, num_bytes_read: float, machine: dict[str, Any], *, multiplied_in: str = "float32"
) -> float:
    """The roofline: neither the products nor the reads can be faster."""
    return max(flops / flops_per_second(machine, multiplied_in), num_bytes_read / (machine["bandwidth_gb_s"] * 1e9))
