"""The programs of a run, compiled from shapes: the same functions that the trainer and the engine start."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from cartridges_jax.aot import inputs
from cartridges_jax.aot.workload import Workload
from cartridges_jax.data.packing import check_rows
from cartridges_jax.distill.settings import make_optimizer
from cartridges_jax.distill.sharding import step_on_mesh
from cartridges_jax.parallel import independent_parts, row_parts
from cartridges_jax.sampling import decoding, reading
from cartridges_jax.sampling.buckets import READ_CHUNK, prompt_bucket, read_rows, slot_bucket
from cartridges_jax.sampling.engine import STEPS_PER_DISPATCH, TOKENS_PER_READ
from cartridges_jax.sampling.prefill import chunk_shape
from cartridges_jax.sampling.select import GREEDY, Choice

# The last, evaluation's read of the whole text, is compiled only on request: not every run evaluates.
PROGRAMS = ("train", "prefill", "decode", "whole_text")
DEFAULT_PROGRAMS = PROGRAMS[:-1]
# A jitted function, its arguments, and those by name.
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result for a program.

    Attributes:
      text: the partitioned program in HLO; "" if the compiler gave up because it does not fit.
      bytes_per_device: peak bytes of everything that is live.
      seconds: seconds of tracing and compilation.
    """

    text: str
    bytes_per_device: int
    seconds: float


def compile_program(program: str, workload: Workload, mesh: Mesh) -> Compiled:
    """Compiles one of `PROGRAMS`.

    Raises:
      UserError: the mesh does not divide the rows, or divides no part of the model.
    """
    begin = time.perf_counter()
    function, arguments, options = _CALLS[program](workload, mesh)
    lowered = function.lower(*arguments, **options)
    try:
        with compilation_cache_off():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), arguments)
        if needed is None:
            raise
        return Compiled("", needed, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    return Compiled(compiled.as_text(), _peak(compiled.memory_analysis()), seconds)


@contextlib.contextmanager
def compilation_cache_off() -> Iterator[None]:
    """Turns the persistent compilation cache off.

    A program for absent devices cannot be loaded from it, and a hit would hide the seconds of compilation.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX asks once in a process whether there is a cache.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _needed(message: str, arguments: Any) -> int | None:
    """The bytes that a compiler's error states: those of the whole program, or those beside its arguments."""
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return int(float(found[1]) * _UNITS[found[2]])
    if found := re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", message):
        return int(float(found[1]) * _UNITS[found[2]]) + sum(map(_shard_bytes, jax.tree.leaves(arguments)))
    return None


def _shard_bytes(leaf: Any) -> int:
    where = getattr(leaf, "sharding", None)
    return 0 if where is None else math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _peak(memory: jax.stages.CompiledMemoryStats) -> int:
    """Peak bytes, donated arguments counted once because results take their place."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(memory.peak_memory_in_bytes, held + memory.temp_size_in_bytes)


def _train(workload: Workload, mesh: Mesh) -> _Call:
    check_rows(workload.train.rows_per_step, workload.train.micro_batches, row_parts(mesh))
    params, frozen, state = inputs.params(workload, mesh), inputs.frozen(workload, mesh), inputs.state(workload, mesh)
    step = step_on_mesh(
        workload.config, make_optimizer(workload.train.clip_norm), inputs.learner(workload), mesh, params, frozen, state,
        tail=workload.train.tail, remat=workload.train.remat,
    )  # fmt: skip
    batch, rate = inputs.batch(workload, mesh), inputs.learning_rate(mesh)
    return step, (params, frozen, inputs.mask(workload, mesh), state, batch, rate), {}


def mesh_of_program(program: str, mesh: Mesh) -> Mesh:
    """The part of a run's mesh that a program uses: self-study's hosts decode independently, each on its part."""
    return independent_parts(mesh)[0] if program in ("prefill", "decode") else mesh


def prefill_shape(workload: Workload) -> tuple[int, int, int]:
    """Rows, tokens of a chunk, and slots of the prompts that are read together."""
    width = prompt_bucket(workload.prompt_tokens)
    tokens = min(width, READ_CHUNK)
    return read_rows(max(1, TOKENS_PER_READ // tokens)), tokens, slot_bucket(width)


def _prefill(workload: Workload, mesh: Mesh) -> _Call:
    num_rows, num_tokens, num_slots = prefill_shape(workload)
    chunk = inputs.chunk(mesh, num_rows, num_tokens)
    arguments = (
        workload.config, inputs.params(workload, mesh), inputs.resident_prefix(workload, mesh),
        inputs.reading_cache(workload, mesh, num_rows, num_slots), inputs.last_hidden(workload, mesh, num_rows), chunk, chunk,
    )  # fmt: skip
    return reading.read_chunk, arguments, {}


def _decode(workload: Workload, mesh: Mesh) -> _Call:
    arguments = (
        workload.config, inputs.params(workload, mesh), inputs.resident_prefix(workload, mesh), inputs.decode_state(workload, mesh),
        inputs.decode_rows(workload, mesh), inputs.enough(mesh),
    )  # fmt: skip
    options = {"choice": Choice.of([GREEDY]), "num_top": workload.top_logprobs, "num_steps": STEPS_PER_DISPATCH}
    return decoding.decode, arguments, options


def whole_text_shape(workload: Workload) -> tuple[int, int]:
    """Tokens of a chunk, and slots, of the whole text that is read in one row."""
    return chunk_shape(workload.whole_text_tokens)


def _whole_text(workload: Workload, mesh: Mesh) -> _Call:
    num_tokens, num_slots = whole_text_shape(workload)
    chunk = inputs.chunk(mesh, 1, num_tokens)
    cache = inputs.reading_cache(workload, mesh, 1, num_slots)
    return reading.read_tokens, (workload.config, inputs.params(workload, mesh), None, cache, chunk, chunk), {}


_CALLS = {"train": _train, "prefill": _prefill, "decode": _decode, "whole_text": _whole_text}
