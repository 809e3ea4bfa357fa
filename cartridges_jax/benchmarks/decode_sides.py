"""The sides of the `decode` benchmark: cartridges_jax and its peers, each as calls that generate tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.benchmarks.peers import LLAMA_CPP, TRANSFORMERS, VLLM
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Model

# Generates tokens; returns them per row, or nothing.
Call = Callable[[], Any]
# The prefix of the prompts in `Side.first_token`.
CARTRIDGE, DOCUMENT = "cartridge", "document"


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that every side does.

    Attributes:
      cartridge: prefix of P slots.
      document: tokens of the whole document as a system message.
      prompts: prompts of one length, one for each row of the largest batch.
      new_tokens: generated per prompt.
    """

    cartridge: KVPrefix
    document: list[int]
    prompts: Sequence[list[int]]
    new_tokens: int

    @property
    def context(self) -> int:
        """Context length of a server: document, prompt and answer, and some to spare."""
        return len(self.document) + len(self.prompts[0]) + self.new_tokens + 16

    def after_document(self, num_rows: int) -> list[list[int]]:
        """Prompts, each after the document."""
        return [[*self.document, *prompt] for prompt in self.prompts[:num_rows]]


class Side(Protocol):
    """One library, under one name or several (dtypes)."""

    def generation(self, num_rows: int) -> dict[str, Call]:
        """By name, the call that answers the first `num_rows` prompts; {} if the side cannot run that batch."""
        ...

    def first_token(self) -> dict[tuple[str, str], Call]:
        """By (name, `CARTRIDGE` or `DOCUMENT`), the call that generates one token after that prefix."""
        ...

    def close(self) -> None:
        """Ends the processes and servers of the side."""


class Ours:
    """Our models by name, all with the same cartridge."""

    def __init__(self, models: dict[str, Model], work: Work):
        self._models, self._work = models, work

    def generation(self, num_rows: int) -> dict[str, Call]:
        work = self._work
        prompts = work.prompts[:num_rows]
        return {name: self._call(name, prompts, work.new_tokens, work.cartridge) for name in self._models}

    def first_token(self) -> dict[tuple[str, str], Call]:
        work = self._work
        return {
            **{(name, CARTRIDGE): self._call(name, work.prompts[:1], 1, work.cartridge) for name in self._models},
            **{(name, DOCUMENT): self._call(name, work.after_document(1), 1, None) for name in self._models},
        }

    def close(self) -> None:
        pass

    def _call(self, name: str, prompts: Sequence[list[int]], new_tokens: int, prefix: KVPrefix | None) -> Call:
        def call() -> list[list[int]]:
            found = sampling.generate_tokens(
                self._models[name], prompts, prefix, max_tokens=new_tokens, stop_ids=(), batch_size=len(prompts)
            )
            return [generation.token_ids for generation in found]

        return call


class TransformersPeft:
    """transformers with PEFT's cartridge, one model for each dtype, for batches of up to `most_rows`."""

    def __init__(self, directory: Path, dtypes: Sequence[str], work: Work, num_threads: int, most_rows: int):
        from cartridges_jax.benchmarks.peers import transformers_peft

        self._peer, self._work, self._most_rows = transformers_peft, work, most_rows
        transformers_peft.use_threads(num_threads)
        arrays = [np.asarray(x, np.float32) for x in (work.cartridge.keys, work.cartridge.values)]
        self._plain = {f"{TRANSFORMERS} {dtype}": transformers_peft.load(directory, dtype) for dtype in dtypes}
        self._with_cartridge = {
            name: transformers_peft.with_cartridge(model, *arrays, 1, trained=False)
            for name, model in self._plain.items()
        }

    def generation(self, num_rows: int) -> dict[str, Call]:
        if num_rows > self._most_rows:
            return {}
        work = self._work
        return {
            name: self._call(model, work.prompts[:num_rows], work.new_tokens)
            for name, model in self._with_cartridge.items()
        }

    def first_token(self) -> dict[tuple[str, str], Call]:
        work = self._work
        return {
            **{
                (name, CARTRIDGE): self._call(model, work.prompts[:1], 1)
                for name, model in self._with_cartridge.items()
            },
            **{(name, DOCUMENT): self._call(model, work.after_document(1), 1) for name, model in self._plain.items()},
        }

    def close(self) -> None:
        pass

    def _call(self, model: Any, prompts: Sequence[list[int]], new_tokens: int) -> Call:
        return lambda: self._peer.generate(model, prompts, new_tokens)


class LlamaCpp:
    """llama.cpp at batch 1, after the document."""

    def __init__(self, file: Path, work: Work, num_threads: int):
        from cartridges_jax.benchmarks.peers.llama_cpp import Server

        self._server, self._work = Server(file, context=work.context, num_threads=num_threads), work

    def generation(self, num_rows: int) -> dict[str, Call]:
        (prompt,) = self._work.after_document(1)
        return {LLAMA_CPP: lambda: self._server.generate(prompt, self._work.new_tokens)} if num_rows == 1 else {}

    def first_token(self) -> dict[tuple[str, str], Call]:
        (prompt,) = self._work.after_document(1)
        # Without its cache, as for a document that no recent request was about.
        return {(LLAMA_CPP, DOCUMENT): lambda: self._server.generate(prompt, 1, cached=False)}

    def close(self) -> None:
        pass


class Vllm:
    """vLLM after the document, one worker for each dtype; its time to the first token is not measured."""

    def __init__(
        self, python: str, directory: Path, dtypes: Sequence[str], work: Work, *, kv_gib: int, num_threads: int
    ):
        from cartridges_jax.benchmarks.peers.vllm_cpu import Worker

        self._work = work
        self._workers = {
            f"{VLLM} {dtype}": Worker(
                python, directory, dtype, max_length=work.context, kv_gib=kv_gib, num_threads=num_threads
            )
            for dtype in dtypes
        }

    def generation(self, num_rows: int) -> dict[str, Call]:
        prompts = self._work.after_document(num_rows)
        return {name: self._call(worker, prompts) for name, worker in self._workers.items()}

    def first_token(self) -> dict[tuple[str, str], Call]:
        return {}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def _call(self, worker: Any, prompts: list[list[int]]) -> Call:
        return lambda: worker.generate(prompts, self._work.new_tokens)
