"""Distillation: conversations to a cartridge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from cartridges_jax.checkpoint import Cartridge, CartridgeMetadata, DocumentSource, load_cartridge, save_cartridge
from cartridges_jax.corpus.questions import questions_hash
from cartridges_jax.data.conversations import Conversation
from cartridges_jax.data.decontaminate import split_contaminated
from cartridges_jax.data.packing import render_example
from cartridges_jax.distill.trainer import StopRequested
from cartridges_jax.distill.trainer import train as distil
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.stages.context import RunContext, flat
from cartridges_jax.pipeline.workdir import Stage
from cartridges_jax.prefixes import make_initial_prefix, prefix_fingerprint


def split(run: RunContext, conversations: list[Conversation]) -> tuple[list[Conversation], list[Conversation], int]:
    """(to train on, held out, dropped because they are evaluation questions)."""
    order = np.random.default_rng([run.config.seed, 1]).permutation(len(conversations))
    heldout = {int(i) for i in order[: run.config.heldout]}
    clean, dropped = split_contaminated(
        [conversation.messages[0].content for conversation in conversations],
        [question.question for question in run.questions],
    )
    kept = [conversations[i] for i in clean if i not in heldout]
    return kept, [conversations[i] for i in sorted(heldout)], len(set(dropped) - heldout)


def train(run: RunContext, study: Stage, conversations: list[Conversation]) -> tuple[Stage, Cartridge]:
    """Trains a cartridge, or reads a finished one back."""
    config = run.config
    stage = run.open("train", {
        "study": study.key,
        "seed": config.seed,
        "heldout": config.heldout,
        "questions": questions_hash(run.questions),
        **flat("cartridge", config.cartridge),
        "initial": prefix_fingerprint(config.cartridge.init),
        **flat("train", config.train),
    })  # fmt: skip
    directory = stage.directory / "cartridge"
    if not stage.done:
        with stage.clock() as clock:
            _train(run, stage, conversations, directory, clock)
    try:
        cartridge = load_cartridge(directory)
    except UserError as error:
        raise UserError(f"{error} (to train it again, delete {stage.directory})") from None
    if run.job.is_first:
        _publish(run, stage, cartridge)
    return stage, cartridge


def _train(run: RunContext, stage: Stage, conversations: list[Conversation], directory: Path, clock) -> None:
    config, model = run.config, run.model
    learned, heldout, dropped = split(run, conversations)
    if not learned:
        raise UserError(
            f"of {len(conversations)} conversations {dropped} equal evaluation questions and the others are held "
            "out: raise study.conversations"
        )
    size = config.cartridge
    initial = make_initial_prefix(
        size.init,
        model,
        run.corpus,
        size.num_slots,
        np.random.default_rng([config.seed, 2]),
        num_frozen=size.num_frozen,
    )
    if initial.num_slots < size.num_slots:
        run.reporter.say(f"cartridge.init={size.init!r} fills {initial.num_slots} of {size.num_slots} slots")
    with run.progress("train", config.train.steps) as bar:

        def on_step(step: int, loss: float | None) -> None:
            bar.at(step, note="" if loss is None else f"loss {loss:.3f}")
            clock.tick()

        try:
            result = distil(
                model,
                initial,
                [render_example(c, model.chat, targets=config.train.targets) for c in learned],
                [render_example(c, model.chat) for c in heldout],
                config.train,
                stage.directory / "checkpoints",
                num_frozen=config.cartridge.num_frozen,
                seed=config.seed,
                job=run.job,
                on_step=on_step,
                should_stop=run.stop.requested,
            )
        except StopRequested:
            run.stop.check()
            raise
    metadata = CartridgeMetadata.of(
        result.prefix,
        model=model,
        learning_mask=np.arange(result.prefix.num_slots) >= config.cartridge.num_frozen,
        documents=[
            DocumentSource(each.document.name, each.document.sha256, each.num_tokens) for each in run.corpus.documents
        ],
        step=config.train.steps,
        config=dataclasses.asdict(config),
    )
    if run.job.is_first:
        save_cartridge(directory, result.prefix, metadata)
    stage.finish({
        "history": result.history,
        "refused_steps": result.refused,
        "dropped_training_questions": dropped,
        "trained_on": len(learned),
        "packing_efficiency": result.packing_efficiency,
        "epochs": result.epochs,
    })  # fmt: skip


def _publish(run: RunContext, stage: Stage, cartridge: Cartridge) -> None:
    """Copies the stage's cartridge to where users look for it, unless it is there."""
    target = run.workdir.path / "cartridge"
    marker = stage.directory.parent / "published"
    if target.exists() and marker.exists() and marker.read_text() == stage.key:
        return
    marker.unlink(missing_ok=True)
    save_cartridge(target, cartridge.prefix, cartridge.metadata)
    marker.write_text(stage.key)
