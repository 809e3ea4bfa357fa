"""Refuses a run that cannot work, before its first minute of work."""

from __future__ import annotations

from collections.abc import Sequence

from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.corpus.questions import Question
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.measuring import longest_example
from cartridges_jax.evaluation.tasks import TaskInputs, make_tasks
from cartridges_jax.models import Model
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.workdir import Workdir
from cartridges_jax.prefixes import check_initial_prefix
from cartridges_jax.prefixes.first_tokens import first_tokens

# For the report, the logs, and what file systems round up.
_SPARE_BYTES = 50_000_000


def _turn_tokens(model: Model) -> int:
    """Tokens that the chat template puts around a question before its answer."""
    return len(model.chat.render_continuation([{"role": "user", "content": "x"}]).token_ids)


def longest_evaluated(config: RunConfig, model: Model, corpus: TokenizedCorpus, questions: Sequence[Question]) -> int:
    """Tokens of the longest example with its answer, as evaluation reads or writes them after a prefix."""
    settings = config.evaluation
    tasks = make_tasks(settings.tasks, TaskInputs(corpus, questions))
    longest = longest_example(model, tasks, settings.max_answer_tokens)
    if questions:
        return longest
    # Held-out questions, which are not written yet, are answered instead.
    return max(longest, _turn_tokens(model) + config.study.writer_max_tokens + settings.max_answer_tokens)


def refuse_what_cannot_work(
    config: RunConfig, model: Model, corpus: TokenizedCorpus, questions: Sequence[Question], workdir: Workdir
) -> None:
    """Checks lengths against the model's context, and the disk's room.

    Raises:
      UserError: the first thing that would fail later, with the setting that helps.
    """
    if "first_tokens" in config.evaluation.conditions:
        first_tokens(model, corpus.text, config.cartridge.num_slots)
    check_initial_prefix(config.cartridge.init, model, corpus, config.cartridge.num_slots)
    tasks = make_tasks(config.evaluation.tasks, TaskInputs(corpus, questions))
    keeps_out = config.heldout and "heldout" in config.evaluation.tasks
    if not keeps_out and not any(task.examples for task in tasks):
        raise UserError("there is nothing to evaluate on: give questions, or hold conversations out (heldout=24)")
    if config.study.top_logprobs > model.config.vocab_size:
        raise UserError(
            f"study.top_logprobs={config.study.top_logprobs} exceeds the model's vocabulary of {model.config.vocab_size}"
        )
    _refuse_long_conversations(config, model, corpus, questions)
    _refuse_full_disk(config, model, workdir)


def _refuse_long_conversations(
    config: RunConfig, model: Model, corpus: TokenizedCorpus, questions: Sequence[Question]
) -> None:
    study, context = config.study, model.config.context_length
    conversation = _turn_tokens(model) + study.writer_max_tokens + study.answer_max_tokens
    if conversation > config.train.row_tokens:
        raise UserError(
            f"a conversation may have {conversation} tokens, train.row_tokens={config.train.row_tokens}: raise it, "
            "or lower study.writer_max_tokens or study.answer_max_tokens"
        )
    longest = max(conversation, longest_evaluated(config, model, corpus, questions))
    if config.cartridge.num_slots + longest > context:
        raise UserError(
            f"a cartridge of {config.cartridge.num_slots} slots and conversations of {longest} tokens exceed "
            f"the model's context of {context}: choose fewer slots or shorter questions and answers"
        )
    # What the template puts around a chunk, beside the chunk itself.
    frame = len(model.chat.system_prefix("x").token_ids)
    document_tokens = corpus.num_tokens
    chunk = min(study.chunk_max_tokens, document_tokens)
    reads_chunks = study.teacher_context == "chunk" or study.writer == "chat"
    if reads_chunks and frame + chunk + longest > context:
        raise UserError(
            f"chunks of up to {chunk} tokens and a conversation of {longest} exceed the model's context of "
            f"{context}: lower study.chunk_max_tokens={study.chunk_max_tokens}"
        )
    if study.teacher_context == "document" and frame + document_tokens + longest > context:
        raise UserError(
            f"the document's {document_tokens} tokens and a conversation of {longest} exceed the model's "
            f"context of {context}: use --config.study.teacher_context=chunk"
        )


def _refuse_full_disk(config: RunConfig, model: Model, workdir: Workdir) -> None:
    slot_values = 2 * model.config.num_layers * model.config.num_kv_heads * model.config.head_dim
    cartridge_bytes = 4 * slot_values * config.cartridge.num_slots
    # A train state holds the slots and Adam's two moments.
    states = (config.train.keep_checkpoints + 1) * 3 * cartridge_bytes
    # An entry of the teacher's log-probabilities is two indices and a value.
    shards = config.study.conversations * config.study.answer_max_tokens * config.study.top_logprobs * 12
    workdir.require_space(states + 3 * cartridge_bytes + shards + _SPARE_BYTES)
