"""Greedy decoding after a cartridge, in tokens per second over the whole batch.

Every side generates the same number of tokens after the same prompts (no stop tokens).
cartridges_jax and transformers + PEFT decode after the cartridge. llama.cpp and vLLM have
no cartridges: they decode after the whole document, whose keys and values are cached from
the call before, as on a server without cartridges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cartridges_jax.benchmarks import figures
from cartridges_jax.benchmarks.decode_sides import (
    CARTRIDGE,
    DOCUMENT,
    LlamaCpp,
    Ours,
    Side,
    TransformersPeft,
    Vllm,
    Work,
)
from cartridges_jax.benchmarks.inputs import (
    COMMON,
    OURS,
    Common,
    config_dict,
    prompts_of_length,
    read_model,
    read_variants,
)
from cartridges_jax.benchmarks.machine import CEILINGS, Ceilings, multiplied_in, step_seconds_at_least
from cartridges_jax.benchmarks.peers import LLAMA_CPP, TRANSFORMERS, VLLM, Absent, hugging_face
from cartridges_jax.benchmarks.peers.vllm_cpu import HOW_TO_INSTALL
from cartridges_jax.benchmarks.results import Result, say_absent
from cartridges_jax.benchmarks.rounds import (
    absent_peers,
    compared,
    compared_variants,
    durations,
    keeping,
    take_turns,
    take_turns_with_ceilings,
)
from cartridges_jax.corpus import read_corpus
from cartridges_jax.errors import UserError
from cartridges_jax.formats.sources import locate
from cartridges_jax.models import Model
from cartridges_jax.models.costs import decode_bytes, decode_flops, kv_bytes_per_token
from cartridges_jax.prefixes.first_tokens import initialise_from_first_tokens
from cartridges_jax.quantized import num_bytes

NAME = "decode"


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """The settings of the measurement.

    Attributes:
      batches: rows decoded together, one setting each; the first gives the headline.
      slots: P of the cartridge.
      prompt_tokens: length of every prompt.
      new_tokens: generated per prompt.
      dtype: dtype of cartridges_jax.
      variants: storage of our weights in further measurements ("bfloat16", "int8").
      peer_dtypes: dtypes of transformers and vLLM.
      transformers_rows: the largest batch for transformers, which copies the cartridge to
        every row; at 128 rows the peers together need more than 24 GiB.
      vllm_python: the Python of an environment with vLLM; "" for none.
      vllm_kv_gib: memory that vLLM may use for keys and values.
    """

    common: Common
    batches: tuple[int, ...]
    slots: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    variants: tuple[str, ...]
    peer_dtypes: tuple[str, ...]
    transformers_rows: int
    vllm_python: str
    vllm_kv_gib: int

    def check(self) -> None:
        """Raises UserError for a value that the benchmark cannot use."""
        if not self.batches or min(self.batches) < 1 or self.new_tokens < 1:
            raise UserError(f"batches={self.batches}, new_tokens={self.new_tokens}: must be 1 or more")


def default_config():
    """The defaults that experiments override."""
    return config_dict(NAME, DecodeSettings(
        common=COMMON, batches=(1, 8, 32, 128), slots=256, prompt_tokens=24, new_tokens=64, dtype="float32",
        variants=("bfloat16", "int8"), peer_dtypes=("float32", "bfloat16"), transformers_rows=32, vllm_python="", vllm_kv_gib=4,
    ))  # fmt: skip


def run(settings: DecodeSettings, workdir: Path) -> Result:
    """Measures every batch size, then the time to the first token; writes the figure."""
    common = settings.common
    document = read_corpus(common.document).documents[0]
    models = read_variants(common, settings.dtype, settings.variants)
    model = models[OURS]
    work = Work(
        cartridge=initialise_from_first_tokens(model, document.text, settings.slots),
        document=model.chat.system_prefix(document.text).token_ids,
        prompts=prompts_of_length(model, document, max(settings.batches), settings.prompt_tokens, common.seed),
        new_tokens=settings.new_tokens,
    )
    rivals, missing = _rivals(settings, model, work, workdir) if common.peers else ([], [])
    say_absent(missing)
    sides: list[Side] = [Ours(models, work), *rivals]
    ceilings = Ceilings(model.config, 512, 128)
    try:
        rows, machines = zip(*(_row(settings, models, sides, ceilings, batch) for batch in settings.batches))
        first = {key: call for side in sides for key, call in side.first_token().items()}
        times = take_turns(f"{NAME} first token", first, repeats=common.repeats)
    finally:
        for side in sides:
            side.close()
    result = Result(
        benchmark=NAME,
        unit="tokens/s",
        rows=list(rows),
        machine=machines[0],
        absent=missing,
        more={
            "slots": settings.slots,
            "document_tokens": len(work.document),
            "prompt_tokens": settings.prompt_tokens,
            "new_tokens": settings.new_tokens,
            "weight_bytes": {name: num_bytes(loaded.params) for name, loaded in models.items()},
            "kv_bytes_per_token": kv_bytes_per_token(model.config, model.dtype),
            "first_token_seconds": {
                name: {
                    prefix: times[name, prefix].median if (name, prefix) in times else None
                    for prefix in (CARTRIDGE, DOCUMENT)
                }
                for name in dict.fromkeys(name for name, _ in times)
            },
            "repeats": common.repeats,
        },
    )
    figures.decode(result, workdir / f"{NAME}.png")
    return result


def _rivals(settings: DecodeSettings, model: Model, work: Work, workdir: Path) -> tuple[list[Side], list[Absent]]:
    """The peers that can be measured here, and the absent ones."""
    common, dtypes = settings.common, settings.peer_dtypes
    missing = absent_peers(common, TRANSFORMERS, LLAMA_CPP)
    names = [peer.name for peer in missing]
    float_model = model if settings.dtype == "float32" else read_model(common)
    directory = hugging_face.export(float_model, workdir / "hugging_face")
    found: list[Side] = []
    if TRANSFORMERS not in names:
        found.append(TransformersPeft(directory, dtypes, work, common.threads, settings.transformers_rows))
    file = locate(common.model)
    if LLAMA_CPP not in names and file.suffix == ".gguf":
        found.append(LlamaCpp(file, work, common.threads))
    if settings.vllm_python:
        kv_gib, threads = settings.vllm_kv_gib, common.threads
        found.append(Vllm(settings.vllm_python, directory, dtypes, work, kv_gib=kv_gib, num_threads=threads))
    else:
        missing.append(Absent(VLLM, HOW_TO_INSTALL))
    return found, missing


def _row(
    settings: DecodeSettings, models: dict[str, Model], sides: Sequence[Side], ceilings: Ceilings, batch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All sides at one batch size, in turns: the row, and the machine's ceilings."""
    calls = {name: call for side in sides for name, call in side.generation(batch).items()}
    answers: dict[str, Any] = {}
    candidates = {name: keeping(answers, name, call) for name, call in calls.items()}
    times, machine = take_turns_with_ceilings(
        f"{NAME} batch {batch}", candidates, ceilings, repeats=settings.common.repeats
    )
    total, seen = batch * settings.new_tokens, settings.prompt_tokens + settings.new_tokens / 2
    read, at_least = {}, {}
    for name, model in models.items():
        flops = decode_flops(model.config, batch, settings.slots + seen)
        read[name] = decode_bytes(model.config, model.params, model.dtype, batch, settings.slots, seen)
        at_least[name] = settings.new_tokens * step_seconds_at_least(
            flops, read[name], machine, multiplied_in=multiplied_in(model.params)
        )
    fractions = {name: at_least[name] / times[name].median for name in models}
    rivals = [name for name in calls if name not in models]
    row = {
        "batch": batch,
        **compared(times, rivals, total),
        "fraction_of_limit": fractions[OURS],
        "variants": compared_variants(times, [name for name in models if name != OURS], rivals, total, fractions),
        "limit": total / at_least[OURS],
        "bytes_per_token": read[OURS] / batch,
        # The other peers decode after the document, not the cartridge.
        "same_tokens": {
            name: _agreement(answers[OURS], answers[name]) for name in rivals if name.startswith(TRANSFORMERS)
        },
        **durations(times),
        "machine": {name: machine[name] for name in CEILINGS},
    }
    return row, machine


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The fraction of rows with the same tokens throughout."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
