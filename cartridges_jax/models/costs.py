"""Lower bounds on a model's arithmetic and memory traffic.

A multiplication and an addition count as two operations. Only matrix products are
counted: norms, rotations, softmax and activations are below two percent of them. N, K, H,
D, F, V, L, P as in `models.config` and `cartridge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.quantized import num_bytes


def layer_matmul_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """[in, out] of the seven weight matrices of a layer."""
    D, F, H = config.d_model, config.d_ff, config.head_dim
    wide, narrow = config.num_heads * H, config.num_kv_heads * H
    return [(D, wide), (D, narrow), (D, narrow), (wide, D), (D, F), (D, F), (F, D)]


def layer_weights(config: ModelConfig) -> int:
    """Numbers in the weight matrices of one layer: 2 D N H + 2 D K H + 3 D F."""
    return sum(rows * columns for rows, columns in layer_matmul_shapes(config))


class Work(NamedTuple):
    """Operations, by the dimension that a mesh's tensor axis splits.

    Attributes:
      heads: the attention's four projections, scores and mixtures.
      mlp: the feed-forward layers.
      vocab: the head.
    """

    heads: float
    mlp: float
    vocab: float


def forward_work(config: ModelConfig, num_tokens: float, num_logits: float, seen: float) -> Work:
    """Operations of one pass over all layers, and of the head.

    Args:
      num_tokens: T, that pass through the layers.
      num_logits: M, tokens that the head is applied to.
      seen: sum over the tokens of how many keys they see, prefix and own.

    Returns:
        heads    L * T * 2 (2 D N H + 2 D K H)  +  L * seen * 4 N H (scores, mixture)
        mlp      L * T * 2 * 3 D F
        vocab    M * 2 D V
    """
    L, D, wide = config.num_layers, config.d_model, config.num_heads * config.head_dim
    mlp = 3 * D * config.d_ff
    return Work(
        heads=L * (num_tokens * 2 * (layer_weights(config) - mlp) + seen * 4 * wide),
        mlp=L * num_tokens * 2 * mlp,
        vocab=num_logits * 2 * D * config.vocab_size,
    )


def keys_seen(lengths: Sequence[int], num_slots: int) -> int:
    """The keys seen by all tokens of conversations after P slots, summed; a token sees itself."""
    return sum(num_slots * t + t * (t + 1) // 2 for t in lengths)


def distillation_work(
    config: ModelConfig, lengths: Sequence[int], num_targets: int, num_slots: int, *, recomputed: bool = False
) -> Work:
    """Operations of one distillation step on a cartridge, after `forward_work`.

        weights    forward, and the same again to propagate the gradient through them;
                   the weights are frozen, so they have no gradient of their own
        attention  forward, and twice that backward (towards probabilities, values,
                   queries, keys)
        head       forward, and the same again backward

    Padding and products with masked keys are not counted: they are work that an
    implementation adds. The bottom layer needs no gradient towards its inputs; it is
    counted like the others (below 1/L too much).

    Args:
      lengths: of the conversations, in tokens.
      num_targets: M.
      num_slots: P.
      recomputed: layers run forward a second time before their backward pass.
    """
    tokens, seen = sum(lengths), keys_seen(lengths, num_slots)
    weights = forward_work(config, tokens, num_targets, 0)
    attention = forward_work(config, 0, 0, seen).heads
    again = int(recomputed)
    return Work(
        heads=(2 + again) * weights.heads + (3 + again) * attention,
        mlp=(2 + again) * weights.mlp,
        vocab=2 * weights.vocab,
    )


def distillation_flops(config: ModelConfig, lengths: Sequence[int], num_targets: int, num_slots: int) -> int:
    """The sum of `distillation_work`, nothing recomputed."""
    return int(sum(distillation_work(config, lengths, num_targets, num_slots)))


def decode_flops(config: ModelConfig, num_rows: int, seen: float) -> float:
    """Operations of one decode step of B rows that see `seen` keys each (prefix and own)."""
    return sum(forward_work(config, num_rows, num_rows, num_rows * seen))


def kv_bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def weights_read(config: ModelConfig, params: Any) -> Any:
    """The parameters that a pass reads in full; of an embedding that is not the head, it reads a few rows."""
    return {name: tree for name, tree in params.items() if name != "embedding" or config.tie_embeddings}


def decode_bytes(
    config: ModelConfig, params: Any, kv_dtype: Any, num_rows: int, shared_slots: int, own_slots: float
) -> float:
    """Bytes that one decode step must read: weights and the shared prefix once, each row's own slots."""
    return num_bytes(weights_read(config, params)) + kv_bytes_per_token(config, kv_dtype) * (
        shared_slots + num_rows * own_slots
    )
