"""KV prefixes by name: initialisers of cartridges, baselines of evaluation and training-free compressors.

    prefix = make_prefix("summary:256", model, corpus, num_slots, rng, room=128)

A member is a function that is registered under a name; any module may register one of its own:

    @register("last_tokens", title="The corpus's last tokens")
    def make(model, corpus, num_slots, rng, *, room=0):
        return sampling.prefill(model, corpus.documents[-1].token_ids[-num_slots:].tolist())
"""

# Members register themselves.
from cartridges_jax.prefixes import (
    first_tokens,
    none,
    pretrained,
    random_vectors,
    summary,
    unrelated_text,
    whole_text,
)
from cartridges_jax.prefixes.registry import (
    PREFIXES,
    Argument,
    Maker,
    Member,
    check_initial_prefix,
    check_prefix_name,
    make_initial_prefix,
    make_prefix,
    prefix_fingerprint,
    prefix_title,
    register,
)

__all__ = [
    "PREFIXES",
    "Argument",
    "Maker",
    "Member",
    "check_initial_prefix",
    "check_prefix_name",
    "first_tokens",
    "make_initial_prefix",
    "make_prefix",
    "none",
    "prefix_fingerprint",
    "prefix_title",
    "pretrained",
    "random_vectors",
    "register",
    "summary",
    "unrelated_text",
    "whole_text",
]
