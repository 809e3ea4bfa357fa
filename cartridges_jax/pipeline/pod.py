"""Runs for many accelerators: their config at the paper's sizes, and the workload that `launch/aot.py` compiles."""

from __future__ import annotations

import dataclasses

import ml_collections

from cartridges_jax.aot.workload import Workload
from cartridges_jax.errors import UserError
from cartridges_jax.models.published import config_without_weights
from cartridges_jax.pipeline.config import AUTO, RunConfig, default_config
from cartridges_jax.pipeline.sizes import auto_slots
from cartridges_jax.selfstudy.settings import PAPER

# Tokens of a chat template around a system message; some templates write dates and rules there.
_TEMPLATE_TOKENS = 64


def pod_config(
    model: str, *, topology: str, mesh: str, micro_batches: int, weights: str = "", num_slots: int = 2048
) -> ml_collections.ConfigDict:
    """A run at the sizes of the paper (arXiv 2506.06266, sections 4 and 5, appendix): 32 packs of 2,048 tokens a step.

    Args:
      model: a hub id.
      topology: see `aot.topology`.
      mesh, micro_batches: a choice that suits it; `launch/aot.py --sweep` finds one.
      weights: "int8" stores the matrices in 8 bits.
      num_slots: P.
    """
    config = default_config()
    config.model, config.dtype, config.weights, config.mesh = model, "bfloat16", weights, mesh
    config.cartridge.num_slots = num_slots
    config.heldout = 256
    config.pod.topology, config.pod.decode_rows, config.pod.context_tokens = topology, 128, 131072
    config.study.update(dataclasses.asdict(PAPER))
    train = config.train
    # An epoch: a pack holds four conversations of 128 + 384 tokens.
    train.steps, train.rows_per_step, train.row_tokens, train.micro_batches = 1024, 32, 2048, micro_batches
    train.learning_rate, train.schedule, train.warmup_steps, train.remat = 1e-2, "constant", 10, True
    train.eval_every, train.checkpoint_every = 128, 64
    return config


def workload_of(config: RunConfig) -> Workload:
    """The workload of a run on the devices that `config.pod` names.

    Raises:
      UserError: no topology, or a model whose shapes are not known here.
    """
    if not config.pod.topology:
        raise UserError("pod.topology is empty: name the devices, for example --config.pod.topology=v5e:4x4")
    shapes = dataclasses.replace(config_without_weights(config.model), windows_see_prefix=config.windows_see_prefix)
    # The text is not read here: "auto" goes by the length that the pod is planned for.
    num_slots = config.cartridge.num_slots or auto_slots(config.pod.context_tokens, config.cartridge.tokens_per_slot)
    return Workload(
        model=config.model,
        config=shapes,
        dtype=config.dtype,
        # "auto" chooses among CPUs' ways of storing weights.
        weights="" if config.weights == AUTO else config.weights,
        num_slots=num_slots,
        prefix_slots=max(num_slots, _teacher_slots(config, shapes.context_length)),
        train=config.train,
        prompt_tokens=config.study.writer_max_tokens,
        answer_tokens=config.study.answer_max_tokens,
        top_logprobs=config.study.top_logprobs,
        mesh=config.mesh,
        topology=config.pod.topology,
        decode_rows=config.pod.decode_rows,
        context_tokens=config.pod.context_tokens,
    )


def _teacher_slots(config: RunConfig, context_length: int) -> int:
    """The largest prefix of self-study's conversations: a chunk or the whole text, as a system message."""
    text = config.pod.context_tokens
    if config.study.teacher_context == "chunk":
        text = min(text, config.study.chunk_max_tokens)
    return min(text + _TEMPLATE_TOKENS, context_length)
