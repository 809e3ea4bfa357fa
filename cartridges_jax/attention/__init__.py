"""Attention over a conversation's own tokens behind a shared KV prefix."""
from cartridges_jax.attention.masks import cache_mask, packed_causal_mask, prefix_mask
from cartridges_jax.attention.xla import LayerPrefix, attend

__all__ = ["LayerPrefix", "attend", "cache_mask", "packed_causal_mask", "prefix_mask"]
