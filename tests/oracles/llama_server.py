"""llama.cpp as an independent oracle: token ids, greedy tokens and their probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax import sampling
from cartridges_jax.benchmarks.peers.llama_cpp import Server
from cartridges_jax.models import Model


class Agreement(NamedTuple):
    """How a model of ours predicts the tokens that llama.cpp wrote.

    Attributes:
      num_tokens: written.
      same: fraction of them that are our most likely ones.
      differences: ours less llama.cpp's log-probability, of every entry above 1 % among its ten likeliest.
    """

    num_tokens: int
    same: float
    differences: np.ndarray


class LlamaServer(Server):
    """Serves one GGUF file on one thread."""

    def __init__(self, model: Path, *, context: int = 512):
        super().__init__(model, context=context, num_threads=1, warmup=False)

    def tokenize(self, text: str, *, control: bool) -> list[int]:
        """Token ids without BOS; `control` parses control-token text (llama.cpp's parse_special)."""
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": control})["tokens"]

    def agreement(self, model: Model, prompt: list[int], new_tokens: int) -> Agreement:
        """Greedy tokens behind a prompt, predicted by `model` from the same tokens."""
        steps = self.complete(prompt, new_tokens, cached=False, n_probs=10)["completion_probabilities"]
        tokens = [step["id"] for step in steps]
        logits = sampling.logits(model, prompt + tokens)[len(prompt) - 1 : -1]
        ours = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
        differences = [
            ours[at, entry["id"]] - entry["logprob"]
            for at, step in enumerate(steps)
            for entry in step["top_logprobs"]
            if math.exp(entry["logprob"]) > 0.01
        ]
        return Agreement(len(tokens), float((ours.argmax(-1) == tokens).mean()), np.asarray(differences))
