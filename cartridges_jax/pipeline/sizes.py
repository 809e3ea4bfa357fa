"""Sizes that follow from the corpus, and an estimate of the time a run of these sizes takes.

A setting of 0 means "auto": `cartridge.num_slots` from the corpus's tokens, `study.conversations` from its sentences,
`train.steps` from the conversations that there are to learn from. The ratios are settings themselves.
"""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.errors import UserError
from cartridges_jax.models import ModelConfig
from cartridges_jax.models.costs import decode_flops, distillation_flops, forward_work
from cartridges_jax.pipeline.config import RunConfig

# Slots come in multiples of this; a smaller cartridge than the least holds little beside the chat template.
_SLOTS_STEP, _LEAST_SLOTS = 16, 32
# At least this many conversations, and at most the paper's 2 x 65,536.
_LEAST_CONVERSATIONS, _MOST_CONVERSATIONS = 64, 131_072

# Shares of the measured rate of matrix products that the stages reached on CPUs: training, and decoding in batches.
_TRAINING_SHARE, _DECODING_SHARE = 0.65, 0.3
# Of the messages that a small model writes, about this many are dropped.
_DROPPED_SHARE = 0.3
# Loading, compiling and writing, in seconds, where programs have to be compiled.
_FIXED_SECONDS = 90.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
      num_slots: P.
      conversations: to keep, held-out ones included.
      steps: of the optimizer; for an estimate only, where the run's own follow from the finished study.
    """

    num_slots: int
    conversations: int
    steps: int


def auto_slots(num_tokens: int, tokens_per_slot: float) -> int:
    """P for a corpus of `num_tokens` tokens: one slot for every `tokens_per_slot` of them, in steps of 16."""
    return max(_LEAST_SLOTS, int(num_tokens / tokens_per_slot) // _SLOTS_STEP * _SLOTS_STEP)


def auto_conversations(num_sentences: int, asks_per_sentence: float, heldout: int) -> int:
    """Conversations that ask about every sentence `asks_per_sentence` times, and those to hold out."""
    wanted = math.ceil(num_sentences * asks_per_sentence) + heldout
    return min(max(wanted, _LEAST_CONVERSATIONS), _MOST_CONVERSATIONS)


def auto_steps(num_tokens: int, epochs: float, rows_per_step: int, row_tokens: int) -> int:
    """Steps that see `num_tokens` tokens of conversations `epochs` times."""
    return max(1, math.ceil(epochs * num_tokens / (rows_per_step * row_tokens)))


def with_sizes(config: RunConfig, corpus: TokenizedCorpus) -> RunConfig:
    """The config with the slots and conversations that "auto" stands for; steps stay 0 until the study is done.

    Raises:
      UserError: a corpus without a sentence to ask about.
    """
    cartridge, study = config.cartridge, config.study
    if not cartridge.num_slots:
        slots = auto_slots(corpus.num_tokens, cartridge.tokens_per_slot)
        cartridge = dataclasses.replace(cartridge, num_slots=slots)
    if not study.conversations:
        if not corpus.sentences:
            raise UserError("the corpus has no sentence to ask about: give it text besides headings")
        count = auto_conversations(len(corpus.sentences), study.asks_per_sentence, config.heldout)
        study = dataclasses.replace(study, conversations=count)
    return dataclasses.replace(config, cartridge=cartridge, study=study)


def expected_sizes(config: RunConfig) -> Sizes:
    """The sizes of a run before its study: the steps are estimated from the lengths that conversations may have."""
    steps = config.train.steps
    if not steps:
        # Questions and answers take about two thirds of what they may.
        tokens = (config.study.writer_max_tokens + config.study.answer_max_tokens) * 2 / 3
        learned = max(config.study.conversations - config.heldout, 1)
        steps = auto_steps(
            round(learned * tokens), config.train.epochs, config.train.rows_per_step, config.train.row_tokens
        )
    return Sizes(config.cartridge.num_slots, config.study.conversations, steps)


def measured_flops(model: ModelConfig, dtype: str, seconds: float = 0.4) -> float:
    """Operations a second of this machine in products of a layer's feed-forward shape.

    Args:
      dtype: of the factors.
      seconds: the least time to measure for.
    """
    D, F = model.d_model, model.d_ff
    x, w = jnp.ones((512, D), dtype), jnp.ones((D, F), dtype)
    product = jax.jit(lambda x, w: jnp.einsum("td,df->tf", x, w, preferred_element_type=jnp.float32))
    product(x, w).block_until_ready()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        product(x, w).block_until_ready()
        count += 1
    return count * 2 * 512 * D * F / elapsed


def estimated_seconds(
    config: RunConfig, model: ModelConfig, sizes: Sizes, corpus_tokens: int, num_questions: int, flops: float
) -> dict[str, float]:
    """Seconds that the stages take: counted operations over the machine's measured rate.

    Args:
      flops: operations a second, from `measured_flops`.

    Returns:
      Stage name to seconds; "fixed" is loading and compiling.
    """
    study, train = config.study, config.train
    context = corpus_tokens if study.teacher_context == "document" else min(study.chunk_max_tokens, corpus_tokens)
    written = sizes.conversations / (1 - _DROPPED_SHARE)
    per_conversation = decode_flops(model, 1, context) * study.answer_max_tokens
    per_conversation += decode_flops(model, 1, 200) * study.writer_max_tokens
    step = distillation_flops(
        model,
        [train.row_tokens // 3] * 3 * train.rows_per_step,
        train.rows_per_step * train.row_tokens // 2,
        sizes.num_slots,
    )
    questions = num_questions or config.heldout
    # Four conditions: an answer and three passes over a question with its answer; the whole text is read once.
    pass_tokens = 2 * config.evaluation.max_answer_tokens
    evaluation = sum(forward_work(model, corpus_tokens, 0, corpus_tokens**2 / 2)) / _TRAINING_SHARE
    evaluation += (
        4 * questions * decode_flops(model, 1, context / 2) * config.evaluation.max_answer_tokens / _DECODING_SHARE
    )
    evaluation += 4 * questions * 3 * sum(forward_work(model, pass_tokens, pass_tokens, 0)) / _TRAINING_SHARE
    return {
        "study": written * per_conversation / _DECODING_SHARE / flops,
        "train": sizes.steps * step / _TRAINING_SHARE / flops,
        "evaluate": evaluation / flops,
        "fixed": _FIXED_SECONDS,
    }


def plan_line(config: RunConfig, model: ModelConfig, corpus: TokenizedCorpus, num_questions: int) -> str:
    """One line with the sizes of a run and the minutes that it will take on this machine, before any work is done."""
    sizes = expected_sizes(config)
    asked = min(num_questions, config.evaluation.max_questions or num_questions)
    flops = measured_flops(model, "bfloat16" if config.weights == "bfloat16" else config.dtype)
    seconds = estimated_seconds(config, model, sizes, corpus.num_tokens, asked, flops)
    about = "" if config.train.steps else "about "
    return (
        f"{corpus.name}: {corpus.num_tokens:,} tokens, {len(corpus.sentences)} sentences, {num_questions} questions; "
        f"{sizes.num_slots} slots, {sizes.conversations:,} conversations, {about}{sizes.steps:,} steps; "
        f"about {max(1, round(sum(seconds.values()) / 60))} minutes on this machine"
    )
