"""Greedy decode behind a cartridge, in tokens per second over the whole batch.

Everybody generates the same number of tokens behind the same prompts, whatever they are
(no stop tokens). Ours and transformers + PEFT have the cartridge in front. llama.cpp and
vLLM have no cartridges: the whole document stands in front, its keys and values cached
from the call before, which is what a server without cartridges does.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax import sampling
from cartridges_jax.benchmarks import figures
from cartridges_jax.benchmarks.inputs import COMMON, Common, config_dict, prompts_of_length, read_model
from cartridges_jax.benchmarks.limits import decode_bytes, decode_flops, kv_bytes_per_token, step_seconds_at_least
from cartridges_jax.benchmarks.machine import Ceilings
from cartridges_jax.benchmarks.peers import LLAMA_CPP, TRANSFORMERS, VLLM, Absent, hugging_face
from cartridges_jax.benchmarks.results import Result, say_absent
from cartridges_jax.benchmarks.rounds import (
    OURS,
    absent_peers,
    compared,
    durations,
    keeping,
    take_turns,
    take_turns_with_ceilings,
)
from cartridges_jax.corpus.documents import read_document
from cartridges_jax.distill.initialise import initialise_from_first_tokens
from cartridges_jax.errors import UserError
from cartridges_jax.formats.sources import locate
from cartridges_jax.quantized import num_bytes

NAME = "decode"


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What is measured.

    Attributes:
      batches: rows decoded together, one setting each; the first gives the headline.
      slots: P of the cartridge.
      prompt_tokens: length of every prompt.
      new_tokens: generated per prompt.
      dtype: ours.
      int8: also measure ourselves with weights in 8 bits.
      peer_dtypes: of transformers and vLLM.
      vllm_python: the python of an environment with vLLM; "" for none.
      vllm_kv_gib: memory that vLLM may use for keys and values.
    """

    common: Common
    batches: tuple[int, ...]
    slots: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    int8: bool
    peer_dtypes: tuple[str, ...]
    vllm_python: str
    vllm_kv_gib: int

    def check(self) -> None:
        """Raises UserError for a value that the benchmark could not use."""
        if not self.batches or min(self.batches) < 1 or self.new_tokens < 1:
            raise UserError(f"batches={self.batches}, new_tokens={self.new_tokens}: must be 1 or more")


def default_config():
    """The defaults that experiments override."""
    return config_dict(NAME, DecodeSettings(
        common=COMMON, batches=(1, 8, 32, 128), slots=256, prompt_tokens=24, new_tokens=64, dtype="float32", int8=True,
        peer_dtypes=("float32", "bfloat16"), vllm_python="", vllm_kv_gib=4,
    ))  # fmt: skip


def run(settings: DecodeSettings, workdir: Path) -> Result:
    """Measures every batch size; writes the figure."""
    common = settings.common
    document = read_document(common.document)
    model = read_model(common, dtype=settings.dtype)
    models = {OURS: model}
    if settings.int8:
        models[f"{OURS} int8"] = read_model(common, dtype=settings.dtype, weights="int8")
    cartridge = initialise_from_first_tokens(model, document.text, settings.slots)
    prompts = prompts_of_length(model, document, max(settings.batches), settings.prompt_tokens, common.seed)
    whole = model.chat.system_prefix(document.text).token_ids

    missing = absent_peers(common, TRANSFORMERS, LLAMA_CPP)
    side: dict[str, Any] = {}  # name to (its model behind the cartridge, its plain model)
    llama = None
    vllm: dict[str, Any] = {}
    if common.peers:
        names = [peer.name for peer in missing]
        float_model = model if settings.dtype == "float32" else read_model(common)
        directory = hugging_face.export(float_model, workdir / "hugging_face")
        if TRANSFORMERS not in names:
            from cartridges_jax.benchmarks.peers import transformers_peft

            transformers_peft.use_threads(common.threads)
            arrays = [np.asarray(x, np.float32) for x in (cartridge.keys, cartridge.values)]
            for dtype in settings.peer_dtypes:
                plain = transformers_peft.load(directory, dtype)
                behind = transformers_peft.with_cartridge(plain, *arrays, 1, trained=False)
                side[f"{TRANSFORMERS} {dtype}"] = behind, plain
        context = len(whole) + settings.prompt_tokens + settings.new_tokens + 16
        file = locate(common.model)
        if LLAMA_CPP not in names and file.suffix == ".gguf":
            from cartridges_jax.benchmarks.peers import llama_cpp

            llama = llama_cpp.Server(file, context=context, num_threads=common.threads)
        if settings.vllm_python:
            from cartridges_jax.benchmarks.peers.vllm_cpu import Worker

            for dtype in settings.peer_dtypes:
                vllm[f"{VLLM} {dtype}"] = Worker(
                    settings.vllm_python, directory, dtype, max_length=context, kv_gib=settings.vllm_kv_gib,
                    num_threads=common.threads,
                )  # fmt: skip
        else:
            from cartridges_jax.benchmarks.peers.vllm_cpu import HOW_TO_INSTALL

            missing.append(Absent(VLLM, HOW_TO_INSTALL))
        say_absent(missing)

    def ours(name: str, rows: int, new_tokens: int, *, front=cartridge, before=()) -> Callable[[], list[list[int]]]:
        asked = [[*before, *prompt] for prompt in prompts[:rows]]

        def call() -> list[list[int]]:
            found = sampling.generate_tokens(
                models[name], asked, front, max_tokens=new_tokens, stop_ids=(), batch_size=rows
            )
            return [generation.token_ids for generation in found]

        return call

    def theirs(name: str, rows: int, new_tokens: int, *, before=()) -> Callable[[], list[list[int]]]:
        behind, plain = side[name]
        asked = [[*before, *prompt] for prompt in prompts[:rows]]
        return lambda: transformers_peft.generate(plain if before else behind, asked, new_tokens)

    ceilings = Ceilings(model.config, 512, 128)
    rows, machines = [], []
    try:
        for batch in settings.batches:
            calls = {name: ours(name, batch, settings.new_tokens) for name in models}
            calls |= {name: theirs(name, batch, settings.new_tokens) for name in side}
            if llama is not None and batch == 1:
                calls[LLAMA_CPP] = lambda: llama.generate([*whole, *prompts[0]], settings.new_tokens)
            for name, worker in vllm.items():
                asked = [[*whole, *prompt] for prompt in prompts[:batch]]
                calls[name] = lambda worker=worker, asked=asked: worker.generate(asked, settings.new_tokens)
            answers: dict[str, Any] = {}
            candidates = {name: keeping(answers, name, call) for name, call in calls.items()}
            label = f"{NAME} batch {batch}"
            times, machine = take_turns_with_ceilings(label, candidates, ceilings, repeats=common.repeats)
            machines.append(machine)
            total = batch * settings.new_tokens
            at_least = {}
            for name, loaded in models.items():
                seen = settings.prompt_tokens + settings.new_tokens / 2
                flops = decode_flops(model.config, batch, settings.slots + seen)
                read = decode_bytes(model.config, loaded.params, model.dtype, batch, settings.slots, seen)
                at_least[name] = settings.new_tokens * step_seconds_at_least(flops, read, machine)
            rivals = [name for name in calls if name not in models]
            rows.append({
                "batch": batch,
                **compared(times, rivals, total),
                "fraction_of_limit": at_least[OURS] / times[OURS].median,
                "variants": {
                    name: {
                        "value": times[name].per_second(total),
                        "ratio": {rival: times[name].times_faster_than(times[rival]) for rival in rivals},
                        "fraction_of_limit": at_least[name] / times[name].median,
                    }
                    for name in models if name != OURS
                },
                "limit": total / at_least[OURS],
                "bytes_per_token": decode_bytes(
                    model.config, model.params, model.dtype, batch, settings.slots,
                    settings.prompt_tokens + settings.new_tokens / 2,
                ) / batch,
                "same_tokens": {name: _agreement(answers[OURS], answers[name]) for name in side},
                **durations(times),
                "machine": {name: machine[name] for name in ("matmul_gflops", "bandwidth_gb_s")},
            })  # fmt: skip

        first = {f"{name}|cartridge": ours(name, 1, 1) for name in models}
        first |= {f"{name}|document": ours(name, 1, 1, front=None, before=whole) for name in models}
        first |= {f"{name}|cartridge": theirs(name, 1, 1) for name in side}
        first |= {f"{name}|document": theirs(name, 1, 1, before=whole) for name in side}
        if llama is not None:
            # Without its cache: a document that nobody has asked about for a while.
            first[f"{LLAMA_CPP}|document"] = lambda: llama.generate([*whole, *prompts[0]], 1, cached=False)
        times = take_turns(f"{NAME} first token", first, repeats=common.repeats)
    finally:
        for worker in vllm.values():
            worker.close()
    names = dict.fromkeys(key.split("|")[0] for key in first)
    result = Result(
        benchmark=NAME,
        unit="tokens/s",
        rows=rows,
        machine=machines[0],
        absent=missing,
        more={
            "slots": settings.slots,
            "document_tokens": len(whole),
            "prompt_tokens": settings.prompt_tokens,
            "new_tokens": settings.new_tokens,
            "weight_bytes": {name: num_bytes(loaded.params) for name, loaded in models.items()},
            "kv_bytes_per_token": kv_bytes_per_token(model.config, model.dtype),
            "first_token_seconds": {
                name: {
                    front: times[f"{name}|{front}"].median if f"{name}|{front}" in times else None
                    for front in ("cartridge", "document")
                }
                for name in names
            },
            "repeats": common.repeats,
        },
    )
    figures.decode(result, workdir / f"{NAME}.png")
    return result


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The fraction of rows with the same tokens throughout."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
