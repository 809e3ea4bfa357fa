"""Attention over a shared KV prefix and a conversation's own tokens."""

from cartridges_jax.attention.attend import attend, packed_view
from cartridges_jax.attention.implementation import attention_implementation
from cartridges_jax.attention.masks import cache_mask, packed_causal_mask, prefix_mask
from cartridges_jax.attention.types import LayerPrefix, PackedRows

__all__ = [
    "LayerPrefix", "PackedRows", "attend", "attention_implementation", "cache_mask", "packed_causal_mask",
    "packed_view", "prefix_mask",
]  # fmt: skip
