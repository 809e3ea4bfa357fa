"""Distillation: conversations to a cartridge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cartridges_jax.checkpoint import Cartridge, load_cartridge, save_cartridge
from cartridges_jax.corpus.questions import questions_hash
from cartridges_jax.data.schema import Conversation
from cartridges_jax.distill.trainer import StopRequested
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.distillation import distil_cartridge
from cartridges_jax.pipeline.stages.context import RunContext, flat
from cartridges_jax.pipeline.workdir import Stage
from cartridges_jax.prefixes import prefix_fingerprint


def train(run: RunContext, study: Stage, conversations: list[Conversation]) -> tuple[Stage, Cartridge]:
    """Trains a cartridge, or reads a finished one back."""
    config = run.config
    stage = run.open("train", {
        "study": study.key,
        "conversations": len(conversations),
        "seed": config.seed,
        "heldout": config.heldout,
        "questions": questions_hash(run.questions),
        **flat("cartridge", config.cartridge),
        "initial": prefix_fingerprint(config.cartridge.init),
        **flat("train", config.train),
    })  # fmt: skip
    directory = stage.directory / "cartridge"
    if not stage.done:
        with stage.clock(0.0 if run.budget is None else run.budget.trial_seconds) as clock:
            _train(run, stage, conversations, directory, clock)
    try:
        cartridge = load_cartridge(directory)
    except UserError as error:
        raise UserError(f"{error} (to train it again, delete {stage.directory})") from None
    if run.job.is_first:
        _publish(run, stage, cartridge)
    return stage, cartridge


def _train(run: RunContext, stage: Stage, conversations: list[Conversation], directory: Path, clock) -> None:
    config = run.config
    with run.progress("train", config.train.steps) as bar:

        def on_step(step: int, steps: int, loss: float | None) -> None:
            bar.at(step, steps, note="" if loss is None else f"loss {loss:.3f}")
            clock.tick()

        try:
            cartridge, record = distil_cartridge(
                run.model,
                run.corpus,
                conversations,
                run.questions,
                size=config.cartridge,
                settings=config.train,
                heldout=config.heldout,
                seed=config.seed,
                directory=stage.directory / "checkpoints",
                config=dataclasses.asdict(config),
                job=run.job,
                say=run.reporter.say,
                on_step=on_step,
                should_stop=run.stop.requested,
            )
        except StopRequested:
            run.stop.check()
            raise
    if run.job.is_first:
        save_cartridge(directory, cartridge.prefix, cartridge.metadata)
    stage.finish(record)


def _publish(run: RunContext, stage: Stage, cartridge: Cartridge) -> None:
    """Copies the stage's cartridge to where users look for it, unless it is there."""
    target = run.workdir.path / "cartridge"
    marker = stage.directory.parent / "published"
    if target.exists() and marker.exists() and marker.read_text() == stage.key:
        return
    marker.unlink(missing_ok=True)
    save_cartridge(target, cartridge.prefix, cartridge.metadata)
    marker.write_text(stage.key)
