"""The programs of a run, compiled from shapes: the very functions that the trainer and the engine start."""
from __future__ import annotations

import dataclasses
import re
import time

import jax
from jax.sharding import Mesh

from cartridges_jax.ahead import inputs
from cartridges_jax.ahead.job import STEPS_PER_DISPATCH, TOKENS_PER_READ, Job
from cartridges_jax.data.packing import check_rows
from cartridges_jax.distill.sharding import step_on_mesh
from cartridges_jax.distill.step import combine_cartridge
from cartridges_jax.distill.trainer import make_optimizer
from cartridges_jax.parallel import row_parts
from cartridges_jax.sampling import programs
from cartridges_jax.sampling.buckets import READ_CHUNK, prompt_bucket, read_rows, slot_bucket
from cartridges_jax.sampling.select import GREEDY, Choice

PROGRAMS = ("train", "prefill", "decode")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a program.

    Attributes:
      text: the partitioned program in HLO; "" where the compiler gave up because it
        does not fit.
      bytes_per_device: at the peak, of everything that is live.
      seconds: that compiling took, tracing included.
    """

    text: str
    bytes_per_device: int
    seconds: float


def compile_program(program: str, job: Job, mesh: Mesh) -> Compiled:
    """Compiles one of `PROGRAMS`.

    Raises:
      UserError: rows that the mesh does not divide, or a mesh that divides nothing of the model.
    """
    begin = time.perf_counter()
    lowered = _LOWER[program](job, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return Compiled("", needed, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    return Compiled(compiled.as_text(), _peak(compiled.memory_analysis()), seconds)


def _needed(message: str) -> int | None:
    """The bytes that a program asks for in a compiler's refusal: "Used 20.51G of 15.75G hbm"."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def _peak(memory: jax.stages.CompiledMemoryStats) -> int:
    """Donated arguments are counted once: results take their place."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(memory.peak_memory_in_bytes, held + memory.temp_size_in_bytes)


def _lower_train(job: Job, mesh: Mesh) -> jax.stages.Lowered:
    check_rows(job.train.rows_per_step, job.train.micro_batches, row_parts(mesh))
    params, frozen, state = inputs.params(job, mesh), inputs.frozen(job, mesh), inputs.state(job, mesh)
    step = step_on_mesh(
        job.config, make_optimizer(job.train), combine_cartridge, mesh, params, frozen, state,
        tail=job.train.tail, remat=job.train.remat,
    )  # fmt: skip
    return step.lower(params, frozen, inputs.mask(job, mesh), state, inputs.batch(job, mesh))


def prefill_shape(job: Job) -> tuple[int, int, int]:
    """(rows, tokens of a chunk, slots) of the prompts that are read together."""
    width = prompt_bucket(job.prompt_tokens)
    tokens = min(width, READ_CHUNK)
    return read_rows(max(1, TOKENS_PER_READ // tokens)), tokens, slot_bucket(width)


def _lower_prefill(job: Job, mesh: Mesh) -> jax.stages.Lowered:
    num_rows, num_tokens, num_slots = prefill_shape(job)
    chunk = inputs.chunk(mesh, num_rows, num_tokens)
    return programs.read_chunk.lower(
        job.config, inputs.params(job, mesh), inputs.front(job, mesh),
        inputs.reading_cache(job, mesh, num_rows, num_slots), inputs.last_hidden(job, mesh, num_rows), chunk, chunk,
    )  # fmt: skip


def _lower_decode(job: Job, mesh: Mesh) -> jax.stages.Lowered:
    return programs.decode.lower(
        job.config, inputs.params(job, mesh), inputs.front(job, mesh), inputs.decode_state(job, mesh),
        inputs.decode_rows(job, mesh), inputs.enough(mesh),
        choice=Choice.of([GREEDY]), num_top=job.top_logprobs, num_steps=STEPS_PER_DISPATCH,
    )  # fmt: skip


_LOWER = {"train": _lower_train, "prefill": _lower_prefill, "decode": _lower_decode}
