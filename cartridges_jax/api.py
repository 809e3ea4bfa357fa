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


def compose(*parts: Prefix, allow_other_weights: bool = False) -> KVPrefix:
    """Several cartridges or prefixes as one, in order (see `cartridge.compose`).

    Args:
      allow_other_weights: accepts cartridges that were trained with different weights of one architecture.

    Raises:
      UserError: cartridges of different models, or of different weights.
    """
    metadata = [part.metadata for part in parts if isinstance(part, Cartridge)]
    names = ", ".join(sorted(m.model_name for m in metadata))
    if len({m.model_fingerprint for m in metadata}) > 1:
        raise UserError(f"cartridges of different models cannot be composed ({names}): train them for one model")
    # A cartridge of format version 1 does not know its weights.
    if len({m.weights_sha256 for m in metadata} - {""}) > 1 and not allow_other_weights:
        raise UserError(
            f"cartridges of different weights cannot be composed ({names}): train them for the same model files, or "
            "accept a worse result with allow_other_weights=True"
        )
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
    allow_other_weights: bool = False,
) -> list[str]:
    """Answers chat turns.

    Args:
      prompts: each a user's message, or a conversation as [{"role", "content"}, …] that
        ends with the user's turn.
      prefix: what stands in front; None is the chat template's default.
      max_tokens: answers are cut after so many tokens.
      temperature: 0 answers greedily.
      allow_other_weights: accepts a cartridge that was trained with other weights of the same architecture, such as
        another quantisation.

    Returns:
      One text per prompt.

    Raises:
      UserError: a cartridge of another model or of other weights, or a conversation that does not fit.
    """
    conversations = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt) for prompt in prompts
    ]
    front = _prefix_of(model, prefix, allow_other_weights)
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


def logits(
    model: Model, token_ids: Sequence[int], *, prefix: Prefix | None = None, allow_other_weights: bool = False
) -> np.ndarray:
    """Next-token logits at every position, [T, V] float32 (see `sampling.logits`)."""
    return sampling.logits(model, token_ids, _prefix_of(model, prefix, allow_other_weights))


def prefill(
    model: Model, token_ids: Sequence[int], *, prefix: Prefix | None = None, allow_other_weights: bool = False
) -> KVPrefix:
    """Tokens to a KV prefix; behind `prefix`, the result stands for both (see `sampling.prefill`)."""
    return sampling.prefill(model, token_ids, _prefix_of(model, prefix, allow_other_weights))


def _prefix_of(model: Model, prefix: Prefix | None, allow_other_weights: bool) -> KVPrefix | None:
    if not isinstance(prefix, Cartridge):
        return prefix
    check_compatible(prefix.metadata, model, allow_other_weights=allow_other_weights)
    return prefix.prefix
