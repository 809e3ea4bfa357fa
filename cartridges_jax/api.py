"""The public calls of `import cartridges_jax as cj`: stable, silent, and without signal handlers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from cartridges_jax import cartridge as prefixes
from cartridges_jax import checkpoint, sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.chat import TooLong
from cartridges_jax.checkpoint import Cartridge, check_compatible, load_cartridge  # noqa: F401
from cartridges_jax.corpus import Chunk, Corpus, Document, read_corpus  # noqa: F401
from cartridges_jax.corpus.questions import Question, read_questions  # noqa: F401
from cartridges_jax.errors import Interrupted, UserError  # noqa: F401
from cartridges_jax.evaluation.evaluate import Evaluation  # noqa: F401
from cartridges_jax.models import Model, load_model  # noqa: F401
from cartridges_jax.parallel import make_mesh  # noqa: F401
from cartridges_jax.pipeline.functional import evaluate, self_study, train  # noqa: F401
from cartridges_jax.selfstudy.synthesis import Study  # noqa: F401

Prefix = KVPrefix | Cartridge
# A user's message, or a conversation as [{"role", "content"}, …] that ends with the user's message.
Prompt = str | Sequence[Mapping[str, str]]


def save_cartridge(cartridge: Cartridge, directory: str | Path) -> None:
    """Writes a cartridge, replacing the one that is there (see `checkpoint.save_cartridge`).

    Raises:
      UserError: values that are not finite, a directory that is something else, or a full disk.
    """
    checkpoint.save_cartridge(directory, cartridge.prefix, cartridge.metadata)


def compose(*parts: Prefix, allow_other_weights: bool = False) -> KVPrefix:
    """Several cartridges or prefixes as one, in order (see `cartridge.compose`).

    Args:
      allow_other_weights: accepts cartridges that were trained with different weights of one architecture.

    Raises:
      UserError: cartridges of different models, or of different weights.
    """
    metadata = [part.metadata for part in parts if isinstance(part, Cartridge)]
    names = ", ".join(sorted(each.model_name for each in metadata))
    if len({each.model_fingerprint for each in metadata}) > 1:
        raise UserError(f"cartridges of different models cannot be composed ({names}): train them for one model")
    # A cartridge of format version 1 does not know its weights.
    if len({each.weights_sha256 for each in metadata} - {""}) > 1 and not allow_other_weights:
        raise UserError(
            f"cartridges of different weights cannot be composed ({names}): train them for the same model files, or "
            "accept a worse result with allow_other_weights=True"
        )
    return prefixes.compose(*(part.prefix if isinstance(part, Cartridge) else part for part in parts))


@overload
def generate(model: Model, prompts: str, **options) -> str: ...
@overload
def generate(model: Model, prompts: Sequence[Prompt], **options) -> list[str]: ...


def generate(  # pyright: ignore[reportInconsistentOverload]
    model: Model,
    prompts: str | Sequence[Prompt],
    *,
    prefix: Prefix | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    allow_other_weights: bool = False,
) -> str | list[str]:
    """Answers users' messages or conversations.

    Args:
      prompts: a list of prompts (see `Prompt`); a bare string is one prompt.
      prefix: a cartridge or KV prefix; None is the chat template's default.
      max_tokens: an answer is cut after this many tokens.
      temperature: 0 answers greedily.
      seed: with a prompt's place it determines its draws.
      allow_other_weights: accepts a cartridge that was trained with other weights of the same architecture, such as
        another quantisation.

    Returns:
      One text per prompt; the text alone for a bare string.

    Raises:
      UserError: a cartridge of another model or of other weights, or a conversation that does not fit the context.
    """
    if isinstance(prompts, str):
        (text,) = generate(
            model, [prompts], prefix=prefix, max_tokens=max_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, allow_other_weights=allow_other_weights,
        )  # fmt: skip
        return text
    kv_prefix = _prefix_of(model, prefix, allow_other_weights)
    generations = sampling.generate_tokens(
        model,
        [_rendered(model, prompt, kv_prefix) for prompt in prompts],
        kv_prefix,
        max_tokens=max_tokens,
        sampling=sampling.Sampling(temperature, top_k, top_p),
        seed=seed,
    )
    return [model.tokenizer.decode(generation.token_ids).strip() for generation in generations]


def stream(
    model: Model,
    prompt: Prompt,
    *,
    prefix: Prefix | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    allow_other_weights: bool = False,
) -> Iterator[str]:
    """Answers one prompt piece by piece; the pieces joined are what `generate` returns.

    Raises:
      UserError: as `generate`, before the first piece; `chat.TooLong` where the conversation does not fit the context.
    """
    kv_prefix = _prefix_of(model, prefix, allow_other_weights)
    token_ids = _rendered(model, prompt, kv_prefix)
    start = 0 if kv_prefix is None else int(kv_prefix.next_position)
    needed = start + len(token_ids) + max_tokens
    if needed > model.config.context_length:
        raise TooLong(
            f"the conversation needs {needed} positions with its answer, the model's context has "
            f"{model.config.context_length}: shorten it or lower max_tokens={max_tokens}"
        )
    return sampling.stream_text(
        model,
        token_ids,
        kv_prefix,
        max_tokens=max_tokens,
        sampling=sampling.Sampling(temperature, top_k, top_p),
        seed=seed,
    )


def logits(
    model: Model, token_ids: Sequence[int], *, prefix: Prefix | None = None, allow_other_weights: bool = False
) -> np.ndarray:
    """Next-token logits at every position, [T, V] float32 (see `sampling.logits`)."""
    return sampling.logits(model, token_ids, _prefix_of(model, prefix, allow_other_weights))


def prefill(
    model: Model, token_ids: Sequence[int], *, prefix: Prefix | None = None, allow_other_weights: bool = False
) -> KVPrefix:
    """Tokens to a KV prefix; after `prefix`, the result contains both (see `sampling.prefill`)."""
    return sampling.prefill(model, token_ids, _prefix_of(model, prefix, allow_other_weights))


def _rendered(model: Model, prompt: Prompt, prefix: KVPrefix | None) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if prefix is None:
        return model.chat.render(messages, add_generation_prompt=True).token_ids
    return model.chat.render_continuation(messages).token_ids


def _prefix_of(model: Model, prefix: Prefix | None, allow_other_weights: bool) -> KVPrefix | None:
    if not isinstance(prefix, Cartridge):
        return prefix
    check_compatible(prefix.metadata, model, allow_other_weights=allow_other_weights)
    return prefix.prefix
