"""Prefill and decode: the one way of generating tokens, for every part of the package."""

from cartridges_jax.sampling.engine import Engine
from cartridges_jax.sampling.generate import generate_tokens
from cartridges_jax.sampling.prefill import logits, prefill
from cartridges_jax.sampling.request import Event, Generation, PrefixHandle, Request
from cartridges_jax.sampling.select import GREEDY, Sampling
from cartridges_jax.sampling.streaming import stream_text

__all__ = [
    "GREEDY",
    "Engine",
    "Event",
    "Generation",
    "PrefixHandle",
    "Request",
    "Sampling",
    "generate_tokens",
    "logits",
    "prefill",
    "stream_text",
]
