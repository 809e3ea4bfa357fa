"""Cartridges in JAX: small trained KV caches that replace a long text in a model's context.

import cartridges_jax as cj

model = cj.load_model("smollm2-135m-instruct")
corpus = cj.read_corpus("my.txt")
study = cj.self_study(model, corpus)
cartridge = cj.train(model, corpus, study)
cj.save_cartridge(cartridge, "my.cartridge")
cj.generate(model, "How many steps does the tower have?", prefix=cartridge)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cartridges_jax.api import (
        Cartridge,
        Chunk,
        Corpus,
        Document,
        Evaluation,
        Interrupted,
        KVPrefix,
        Model,
        Question,
        Study,
        UserError,
        compose,
        evaluate,
        generate,
        load_cartridge,
        load_model,
        logits,
        make_mesh,
        prefill,
        read_corpus,
        read_questions,
        save_cartridge,
        self_study,
        stream,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "Cartridge",
    "Chunk",
    "Corpus",
    "Document",
    "Evaluation",
    "Interrupted",
    "KVPrefix",
    "Model",
    "Question",
    "Study",
    "UserError",
    "compose",
    "evaluate",
    "generate",
    "load_cartridge",
    "load_model",
    "logits",
    "make_mesh",
    "prefill",
    "read_corpus",
    "read_questions",
    "save_cartridge",
    "self_study",
    "stream",
    "train",
]


def __getattr__(name: str):
    # Deferred, so that importing one light part does not start JAX.
    if name in __all__:
        return getattr(importlib.import_module("cartridges_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
