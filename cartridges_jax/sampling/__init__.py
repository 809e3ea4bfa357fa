"""Prefill and decode: the one way tokens are made, for every part of the package."""
from cartridges_jax.sampling.generate import Generation, generate_tokens
from cartridges_jax.sampling.prefill import logits, prefill
from cartridges_jax.sampling.select import GREEDY, Sampling

__all__ = ["GREEDY", "Generation", "Sampling", "generate_tokens", "logits", "prefill"]
