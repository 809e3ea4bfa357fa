"""The few calls that most users need; stable, and re-exported by the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cartridges_jax import cartridge as prefixes
from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.checkpoint import Cartridge, check_compatible, load_cartridge
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model, load_model
from cartridges_jax.parallel import make_mesh

__all__ = ["compose", "generate", "load_cartridge", "load_model", "logits", "make_mesh", "prefill"]

Prefix = KVPrefix | Cartridge


def compose(*parts: Prefix) -> KVPrefix:
    """Several cartridges or prefixes as one, in order (see `cartridge.compose`).

    Raises:
      UserError: cartridges of different models.
    """
    fingerprints = {part.metadata.model_fingerprint for part in parts if isinstance(part, Cartridge)}
    if len(fingerprints) > 1:
        names = ", ".join(sorted(part.metadata.model_name for part in parts if isinstance(part, Cartridge)))
        raise UserError(f"cartridges of different models cannot be composed ({names}): train them for one model")
    return prefixes.compose(*(part.prefix if isinstance(part, Cartridge) else part for part in parts))


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    prefix: Prefix | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Answers chat turns.

    Args:
      prompts: each a user's message, or a conversation as [{"role", "content"}, …] that
        ends with the user's turn.
      prefix: what stands in front; None is the chat template's default.
      max_tokens: answers are cut after so many tokens.
      temperature: 0 answers greedily.

    Returns:
      One text per prompt.

    Raises:
      UserError: a cartridge of another model, or a conversation that does not fit.
    """
    conversations = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt) for prompt in prompts
    ]
    front = _prefix_of(model, prefix)
    if front is None:
        rendered = [model.chat.render(turns, add_generation_prompt=True) for turns in conversations]
    else:
        rendered = [model.chat.render_continuation(turns) for turns in conversations]
    generations = sampling.generate_tokens(
        model,
        [r.token_ids for r in rendered],
        front,
        max_tokens=max_tokens,
        sampling=sampling.Sampling(temperature, top_k, top_p),
        seed=seed,
    )
    return [model.tokenizer.decode(generation.token_ids).strip() for generation in generations]


def logits(model: Model, token_ids: Sequence[int], *, prefix: Prefix | None = None) -> np.ndarray:
    """Next-token logits at every position, [T, V] float32 (see `sampling.logits`)."""
    return sampling.logits(model, token_ids, _prefix_of(model, prefix))


def prefill(model: Model, token_ids: Sequence[int], *, prefix: Prefix | None = None) -> KVPrefix:
    """Tokens to a KV prefix; behind `prefix`, the result stands for both (see `sampling.prefill`)."""
    return sampling.prefill(model, token_ids, _prefix_of(model, prefix))


def _prefix_of(model: Model, prefix: Prefix | None) -> KVPrefix | None:
    if not isinstance(prefix, Cartridge):
        return prefix
    config = model.config
    check_compatible(
        prefix.metadata,
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        shape=(config.num_layers, config.num_kv_heads, config.head_dim),
    )
    return prefix.prefix
