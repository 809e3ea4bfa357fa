"""One answer as text, piece by piece while it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Model
from cartridges_jax.sampling.engine import Engine
from cartridges_jax.sampling.request import Request
from cartridges_jax.sampling.select import GREEDY, Sampling

# What a decoder puts in the place of bytes that are not, or not yet, a character.
_INCOMPLETE = "\ufffd"


def stream_text(
    model: Model,
    prompt: Sequence[int],
    prefix: KVPrefix | None = None,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    steps_per_piece: int = 4,
) -> Iterator[str]:
    """Yields the answer to one prompt as it is generated.

    The pieces joined are the whole answer without surrounding white space. A character whose bytes come from several
    tokens is held back until it is complete.

    Args:
      prompt: token ids, at least one.
      prefix: P slots before the prompt.
      max_tokens: the answer is cut after this many tokens.
      steps_per_piece: tokens generated between two pieces.

    Raises:
      UserError: a prompt that the model cannot read or continue that far; before the first piece.
    """
    engine = Engine(model, num_slots=1, steps_per_dispatch=steps_per_piece)
    handle = None if prefix is None else engine.add_prefix(prefix)
    engine.submit(Request(list(prompt), max_tokens, handle, sampling, tuple(model.chat.stop_ids), seed=seed))
    return _pieces(model, engine)


def _pieces(model: Model, engine: Engine) -> Iterator[str]:
    token_ids: list[int] = []
    sent = ""
    while engine.busy:
        for event in engine.step():
            token_ids += event.token_ids
            text = model.tokenizer.decode(token_ids).lstrip()
            if not event.stop_reason:
                text = text.rstrip(_INCOMPLETE)
            # Trailing space is sent with what follows it, if anything does.
            text = text.rstrip()
            if len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
                sent = text
