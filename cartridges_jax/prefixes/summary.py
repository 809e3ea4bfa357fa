"""A summary of the corpus that the model writes itself: compression by text, at a budget of tokens.

The summary takes the place of the whole text in the system message, as in the paper's prompt-compression baseline; there
a larger model writes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import Chunk, TokenizedCorpus
from cartridges_jax.corpus.documents import BREAK
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.prefixes.registry import Argument, refuse_larger, register

REQUEST = (
    "Write a summary of the text above in at most {words} words. Keep the names, numbers and facts that a reader would "
    "need to answer questions about it. Write only the summary."
)
# Below this a share of the budget is no summary.
_MIN_TOKENS = 8
# A chunk's text, encoded on its own, may have a few tokens more than it has inside its document.
_SLACK = 8


def _check(argument: str) -> None:
    if not (argument.isascii() and argument.isdigit()) or int(argument) < _MIN_TOKENS:
        raise UserError(f"the prefix 'summary:{argument}': give a number of tokens, {_MIN_TOKENS} or more")


def _frame(model: Model) -> int:
    """Tokens that the template puts around a system message."""
    rendered = model.chat.system_prefix("x")
    begin, end = rendered.spans[0]
    return len(rendered.token_ids) - (end - begin)


def _budget(model: Model, num_slots: int, argument: str) -> int:
    """Tokens of the summary: the argument, or what fits `num_slots`."""
    budget = int(argument) if argument else num_slots - _frame(model)
    if budget < _MIN_TOKENS:
        raise UserError(
            f"{num_slots} slots leave {max(budget, 0)} tokens for a summary beside the chat template's {_frame(model)}: "
            f"choose at least {_frame(model) + _MIN_TOKENS}"
        )
    return budget


def _request(model: Model, budget: int) -> list[int]:
    """The request for a summary; English text has about four tokens to three words."""
    text = REQUEST.format(words=max(1, budget * 3 // 4))
    return model.chat.render_continuation([{"role": "user", "content": text}]).token_ids


def _pieces(model: Model, corpus: TokenizedCorpus, budget: int) -> list[tuple[str, int]]:
    """(text, tokens of its summary): the whole corpus if it fits the context, else chunks that do.

    Chunks of one document are of nearly equal size; each has the part of the budget that it is of the corpus.
    """
    context = model.config.context_length
    spare = context - budget - len(_request(model, budget))
    if len(model.chat.system_prefix(corpus.text).token_ids) <= spare:
        return [(corpus.text, budget)]
    chunks = list(_chunks(model, corpus, spare - _frame(model) - _SLACK))
    total = sum(chunk.num_tokens for chunk in chunks)
    shares = [budget * chunk.num_tokens // total for chunk in chunks]
    if min(shares) < _MIN_TOKENS:
        raise UserError(
            f"the corpus does not fit the model's context of {context} and is summarised in {len(chunks)} parts, for "
            f"which {budget} tokens are too few: raise the budget (summary:TOKENS) or cartridge.num_slots"
        )
    return [(corpus.chunk_text(chunk), share) for chunk, share in zip(chunks, shares)]


def _chunks(model: Model, corpus: TokenizedCorpus, room: int) -> Iterator[Chunk]:
    """Chunks that cover the corpus, each of at most `room` tokens with its header."""
    for number, document in enumerate(corpus.documents):
        header = corpus.header(number)
        longest = room - (len(model.tokenizer.encode(header)) if header else 0)
        if longest < 1:
            raise UserError(
                f"the model's context of {model.config.context_length} has no room for a text beside the request for "
                "a summary: lower the budget (summary:TOKENS) or cartridge.num_slots"
            )
        parts = -(-document.num_tokens // longest)
        edges = np.linspace(0, document.num_tokens, parts + 1).astype(int).tolist()
        for start, end in zip(edges, edges[1:]):
            yield Chunk(number, start, end, header)


def summarise(model: Model, corpus: TokenizedCorpus, budget: int) -> str:
    """A summary of at most about `budget` tokens, decoded greedily; summaries of several chunks are joined.

    Raises:
      UserError: a budget that is too small for the corpus or too large for the context, or an empty summary.
    """
    summaries = []
    for text, share in _pieces(model, corpus, budget):
        context = sampling.prefill(model, model.chat.system_prefix(text).token_ids)
        (written,) = sampling.generate_tokens(model, [_request(model, share)], context, max_tokens=share)
        summaries.append(model.tokenizer.decode(written.token_ids).strip())
    summary = BREAK.join(filter(None, summaries))
    if not summary:
        raise UserError(f"{model.name} wrote an empty summary of {corpus.name!r}: choose another prefix")
    return summary


def _fits(model: Model, corpus: TokenizedCorpus, num_slots: int, *, argument: str) -> None:
    budget = _budget(model, num_slots, argument)
    refuse_larger(f"a summary of {budget} tokens", budget + _frame(model), num_slots)
    _pieces(model, corpus, budget)


@register(
    "summary",
    title="A summary by the model",
    argument=Argument("TOKENS", _check, required=False),
    fits=_fits,
)
def make_summary(
    model: Model,
    corpus: TokenizedCorpus,
    num_slots: int,
    rng: np.random.Generator,
    *,
    room: int = 0,
    argument: str = "",
) -> KVPrefix:
    """The summary as a system message, cut where it exceeds its budget.

    The budget is the argument (tokens of the summary's text) or, without one, what fits `num_slots`. A model that stops
    earlier gives fewer slots; as an initialiser the cartridge then has fewer than `num_slots`.
    """
    budget = _budget(model, num_slots, argument)
    rendered = model.chat.system_prefix(summarise(model, corpus, budget))
    begin, end = rendered.spans[0]
    return sampling.prefill(model, rendered.token_ids[: min(end, begin + budget)] + rendered.token_ids[end:])
