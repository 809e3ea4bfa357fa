"""A cartridge from conversations: split, initialise, train, describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.checkpoint import Cartridge, CartridgeMetadata, DocumentSource
from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.corpus.questions import Question
from cartridges_jax.data.decontaminate import Split, split_conversations
from cartridges_jax.data.examples import Example, render_examples
from cartridges_jax.data.schema import Conversation
from cartridges_jax.distill.learner import make_learner
from cartridges_jax.distill.settings import TrainSettings
from cartridges_jax.distill.trainer import train
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.parallel import ALONE, Job
from cartridges_jax.pipeline.config import CartridgeSettings
from cartridges_jax.pipeline.sizes import auto_steps
from cartridges_jax.prefixes import make_initial_prefix

# The streams of random numbers that a run's seed is split into.
_HELDOUT_STREAM, _INITIAL_STREAM = 1, 2


def _stream(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))


def spread(questions: Sequence[Question], limit: int) -> list[Question]:
    """At most `limit` of the questions, spread evenly; 0 is all."""
    if not limit or len(questions) <= limit:
        return list(questions)
    return [questions[i] for i in np.linspace(0, len(questions) - 1, limit).round().astype(int)]


def split(conversations: Sequence[Conversation], questions: Sequence[Question], heldout: int, seed: int) -> Split:
    """Splits conversations into training ones, without evaluation questions, and held-out ones that training does not ask."""
    return split_conversations(
        [[m.content for m in conversation.messages if m.role == "user"] for conversation in conversations],
        [question.question for question in questions],
        heldout,
        _stream(seed, _HELDOUT_STREAM),
    )


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Conversations as examples.

    Attributes:
      parts: the split that they come from.
      examples: to train on.
      heldout: for the held-out loss.
    """

    parts: Split
    examples: list[Example]
    heldout: list[Example]

    @property
    def num_tokens(self) -> int:
        """Tokens of the examples to train on."""
        return sum(len(example.tokens) for example in self.examples)


def training_data(
    model: Model,
    conversations: Sequence[Conversation],
    questions: Sequence[Question],
    settings: TrainSettings,
    *,
    heldout: int,
    seed: int,
) -> TrainingData:
    """Splits and renders conversations.

    Raises:
      UserError: no conversation is left to train on.
    """
    parts = split(conversations, questions, heldout, seed)
    if not parts.training:
        raise UserError(
            f"of {len(conversations)} conversations {parts.dropped['like_evaluation']} equal evaluation questions and "
            "the others are held out: raise study.conversations"
        )
    return TrainingData(
        parts,
        [
            example
            for i in parts.training
            for example in render_examples(conversations[i], model.chat, targets=settings.targets)
        ],
        [example for i in parts.heldout for example in render_examples(conversations[i], model.chat)],
    )


def initial_prefix(model: Model, corpus: TokenizedCorpus, size: CartridgeSettings, seed: int) -> KVPrefix:
    """The prefix that training starts from."""
    return make_initial_prefix(
        size.init,
        model,
        corpus,
        size.num_slots,
        _stream(seed, _INITIAL_STREAM),
        num_frozen=size.num_frozen,
    )


def distil_cartridge(
    model: Model,
    corpus: TokenizedCorpus,
    conversations: Sequence[Conversation],
    questions: Sequence[Question],
    *,
    size: CartridgeSettings,
    settings: TrainSettings,
    heldout: int,
    seed: int,
    directory: Path,
    config: Mapping[str, Any],
    job: Job = ALONE,
    say: Callable[[str], None] = lambda text: None,
    on_step: Callable[[int, int, float | None], None] = lambda step, steps, loss: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Cartridge, dict[str, Any]]:
    """Trains a cartridge on conversations about a corpus, from the newest checkpoint in `directory` if there is one.

    Args:
      questions: evaluation questions; conversations that ask one of them are not trained on.
      size: with the number of slots.
      settings: of the training; 0 steps are resolved from its epochs and the conversations.
      heldout: conversations to keep out of training for the held-out loss.
      config: stored with the cartridge.
      on_step: called with (steps taken, all steps, that step's loss); see `trainer.train`.

    Returns:
      The cartridge, and what happened: JSON values for the report.

    Raises:
      UserError, StopRequested: as `trainer.train`, or no conversation is left to train on.
    """
    data = training_data(model, conversations, questions, settings, heldout=heldout, seed=seed)
    parts, examples = data.parts, data.examples
    if not settings.steps:
        num_tokens = data.num_tokens
        steps = auto_steps(num_tokens, settings.epochs, settings.rows_per_step, settings.row_tokens)
        settings = dataclasses.replace(settings, steps=steps)
        say(f"{len(parts.training)} conversations of {num_tokens:,} tokens, {settings.epochs:g} epochs: {steps} steps")
    initial = initial_prefix(model, corpus, size, seed)
    if initial.num_slots < size.num_slots:
        say(f"cartridge.init={size.init!r} fills {initial.num_slots} of {size.num_slots} slots")
    result = train(
        model,
        initial,
        examples,
        data.heldout,
        settings,
        directory,
        learner=make_learner(settings.learner, num_frozen=size.num_frozen),
        seed=seed,
        job=job,
        on_step=lambda step, loss: on_step(step, settings.steps, loss),
        should_stop=should_stop,
    )
    metadata = CartridgeMetadata.of(
        result.prefix,
        model=model,
        learning_mask=np.arange(result.prefix.num_slots) >= size.num_frozen,
        documents=[
            DocumentSource(each.document.name, each.document.sha256, each.num_tokens) for each in corpus.documents
        ],
        step=settings.steps,
        config=config,
    )
    return Cartridge(result.prefix, metadata), {
        "steps": settings.steps,
        "history": result.history,
        "refused_steps": result.refused,
        "dropped_training_questions": parts.dropped["like_evaluation"],
        "dropped_heldout_conversations": parts.dropped["like_training"],
        "heldout": len(parts.heldout),
        "trained_on": len(parts.training),
        "packing_efficiency": result.packing_efficiency,
        "epochs": result.epochs,
    }
