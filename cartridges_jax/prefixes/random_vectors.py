"""Random keys and values: the paper's weakest initialiser (29.9 % on LongHealth, against 55.3 % from first tokens)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from cartridges_jax import cartridge, parallel, sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.prefixes.registry import register
from cartridges_jax.prefixes.unrelated_text import unrelated_tokens

# Tokens of the shipped text that the statistics are taken from.
SAMPLE_TOKENS = 256


def _statistics(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of vectors [L, K, T, H] over T and H, each [L, K, 1, 1].

    The first token is left out: as attention sink it has keys and values unlike those of all others.
    """
    vectors = vectors[:, :, 1:].astype(np.float64)
    return vectors.mean(axis=(2, 3), keepdims=True), vectors.std(axis=(2, 3), keepdims=True)


@register("random_vectors", title="Random vectors")
def make_random_vectors(
    model: Model, corpus: TokenizedCorpus, num_slots: int, rng: np.random.Generator, *, room: int = 0
) -> KVPrefix:
    """Keys and values [L, K, P, H] from a normal distribution, at positions 0..P-1.

    Mean and standard deviation are one number for every layer and key/value head: those of the model's own keys (after
    RoPE) and values of `SAMPLE_TOKENS` tokens of the text that ships with the package, without the first token. All
    slots are random, the first one included: no token serves as attention sink.

    Raises:
      UserError: `num_slots` below 1.
    """
    if num_slots < 1:
        raise UserError(f"num_slots={num_slots}: random_vectors needs 1 or more")
    sample = sampling.prefill(model, unrelated_tokens(model, min(SAMPLE_TOKENS, model.config.context_length)))
    drawn = []
    for vectors in (sample.keys, sample.values):
        mean, deviation = _statistics(parallel.fetch(vectors))
        num_layers, num_kv_heads, _, head_dim = vectors.shape
        noise = rng.standard_normal((num_layers, num_kv_heads, num_slots, head_dim))
        drawn.append(jnp.asarray(mean + deviation * noise, model.dtype))
    return parallel.place_prefix(cartridge.from_plain_tokens(*drawn), model.mesh, in_use=True)
