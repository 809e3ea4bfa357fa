"""Cartridges in JAX: small trained KV caches that replace a long text in a model's context.

import cartridges_jax as cj

model = cj.load_model("smollm2-135m-instruct")
cartridge = cj.load_cartridge("runs/quickstart/cartridge")
cj.generate(model, "How many steps does the tower have?", prefix=cartridge)
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "Cartridge",
    "Chunk",
    "Corpus",
    "Document",
    "Interrupted",
    "KVPrefix",
    "Model",
    "UserError",
    "compose",
    "generate",
    "load_cartridge",
    "load_model",
    "logits",
    "make_mesh",
    "prefill",
    "read_corpus",
    "stream",
]


def __getattr__(name: str):
    # Deferred, so that importing one light part does not start JAX.
    if name in __all__:
        return getattr(importlib.import_module("cartridges_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
