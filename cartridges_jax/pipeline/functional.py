"""The stages of a run as plain calls: for notebooks and threads, silent, without a workdir or signal handlers."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cartridges_jax.checkpoint import Cartridge
from cartridges_jax.corpus import Corpus, TokenizedCorpus, tokenize_corpus
from cartridges_jax.corpus.questions import Question
from cartridges_jax.data.schema import Conversation
from cartridges_jax.distill.settings import TrainSettings
from cartridges_jax.evaluation.conditions import make_conditions
from cartridges_jax.evaluation.evaluate import Evaluation, EvaluationSettings
from cartridges_jax.evaluation.evaluate import evaluate as measure
from cartridges_jax.evaluation.measuring import longest_example
from cartridges_jax.evaluation.tasks import TaskInputs, make_tasks
from cartridges_jax.models import Model
from cartridges_jax.pipeline.config import CartridgeSettings
from cartridges_jax.pipeline.distillation import distil_cartridge, split, spread
from cartridges_jax.pipeline.sizes import auto_conversations, auto_slots
from cartridges_jax.selfstudy.settings import SynthesisSettings
from cartridges_jax.selfstudy.synthesis import Study, synthesise

# (done, all) of the work of one call.
OnProgress = Callable[[int, int], None]
HELDOUT = 24


def _ignore(done: int, total: int) -> None:
    """The default `on_progress`."""


def self_study(
    model: Model,
    corpus: Corpus | TokenizedCorpus,
    *,
    settings: SynthesisSettings | None = None,
    seed: int = 0,
    directory: str | Path | None = None,
    on_progress: OnProgress = _ignore,
    on_warning: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Study:
    """Lets the model study a corpus: it asks itself questions about it and answers them with the text in context.

    Args:
      settings: the small model's by default; `selfstudy.settings.PAPER` has the paper's.
      seed: determines what is asked and drawn.
      directory: stores the conversations; a call with the same arguments resumes there. By default they are in a
        temporary directory that goes with the returned object.
      on_progress: called with (conversations stored, conversations wanted).
      on_warning: called with a line of text where there are fewer conversations than wanted.
      **changes: single settings, such as conversations=256.

    Raises:
      UserError: bad settings, or a text that leaves nothing to ask about.
    """
    corpus = _tokenized(corpus, model)
    settings = dataclasses.replace(settings or SynthesisSettings(), **changes)
    if not settings.conversations:
        count = auto_conversations(len(corpus.sentences), settings.asks_per_sentence, HELDOUT)
        settings = dataclasses.replace(settings, conversations=count)
    place = Path(directory or tempfile.mkdtemp(prefix="self-study-"))
    place.mkdir(parents=True, exist_ok=True)
    try:
        study = synthesise(model, corpus, place, settings, seed=seed, on_progress=on_progress, warn=on_warning)
    except BaseException:
        if directory is None:
            shutil.rmtree(place, ignore_errors=True)
        raise
    if directory is None:
        # The teacher's log-probabilities are read from the files while training.
        weakref.finalize(study, shutil.rmtree, place, ignore_errors=True)
    return study


def train(
    model: Model,
    corpus: Corpus | TokenizedCorpus,
    study: Study | Sequence[Conversation],
    *,
    num_slots: int = 0,
    init: str = "first_tokens",
    settings: TrainSettings | None = None,
    questions: Sequence[Question] | None = None,
    heldout: int = HELDOUT,
    seed: int = 0,
    directory: str | Path | None = None,
    on_progress: OnProgress = _ignore,
    **changes: Any,
) -> Cartridge:
    """Trains a cartridge on a study's conversations.

    Args:
      num_slots: P; 0 follows from the corpus.
      init: the initial prefix, a name of the prefix registry.
      settings: of the training; the small model's by default.
      questions: evaluation questions, whose likes are not trained on; None is those that came with the documents.
      heldout: conversations to keep out of training.
      seed: of the data order.
      directory: of checkpoints; a call with the same arguments resumes there. None stores none.
      on_progress: called with (steps taken, all steps).
      **changes: single settings, such as steps=100.

    Raises:
      UserError: bad settings, or too many steps whose loss was not finite.
    """
    corpus = _tokenized(corpus, model)
    settings = dataclasses.replace(settings or TrainSettings(), **changes)
    size = CartridgeSettings(num_slots=num_slots, init=init)
    if not num_slots:
        size = dataclasses.replace(size, num_slots=auto_slots(corpus.num_tokens, size.tokens_per_slot))
    with tempfile.TemporaryDirectory(prefix="train-") as temporary:
        cartridge, _ = distil_cartridge(
            model,
            corpus,
            study.conversations if isinstance(study, Study) else study,
            list(corpus.corpus.questions if questions is None else questions),
            size=size,
            settings=settings,
            heldout=heldout,
            seed=seed,
            directory=Path(directory or temporary),
            config={
                "model": model.name,
                "dtype": jnp.dtype(model.dtype).name,
                "windows_see_prefix": model.config.windows_see_prefix,
                "seed": seed,
                "cartridge": dataclasses.asdict(size),
                "train": dataclasses.asdict(settings),
            },
            on_step=lambda step, steps, loss: on_progress(step, steps),
        )
    return cartridge


def evaluate(
    model: Model,
    corpus: Corpus | TokenizedCorpus,
    cartridge: Cartridge,
    *,
    questions: Sequence[Question] | None = None,
    study: Study | Sequence[Conversation] = (),
    heldout: int = HELDOUT,
    settings: EvaluationSettings | None = None,
    seed: int = 0,
    on_progress: OnProgress = _ignore,
) -> Evaluation:
    """Measures a cartridge against the text in context, and the other conditions of the settings.

    Args:
      questions: human questions; None is those that came with the documents.
      study: the conversations of the training; those that `train` held out (with the same `heldout`, `seed` and
        `questions`) are measured too.
      on_progress: called with (sequences done, all sequences).

    Raises:
      UserError: neither questions nor a study, or texts that exceed the model's context.
    """
    corpus = _tokenized(corpus, model)
    settings = settings or EvaluationSettings()
    asked = list(corpus.corpus.questions if questions is None else questions)
    conversations = study.conversations if isinstance(study, Study) else study
    kept_out = []
    if conversations:
        kept_out = [conversations[i] for i in split(conversations, asked, heldout, seed).heldout]
    tasks = make_tasks(settings.tasks, TaskInputs(corpus, spread(asked, settings.max_questions), kept_out))
    room = longest_example(model, tasks, settings.max_answer_tokens)
    conditions = make_conditions(model, corpus, cartridge.prefix, settings.conditions, room=room, seed=seed)
    return measure(model, conditions, tasks, settings, on_progress=on_progress)


def _tokenized(corpus: Corpus | TokenizedCorpus, model: Model) -> TokenizedCorpus:
    return corpus if isinstance(corpus, TokenizedCorpus) else tokenize_corpus(corpus, model.tokenizer)
