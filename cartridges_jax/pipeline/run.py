"""A run: study, train, evaluate, report. Each stage is skipped when its inputs' hash is unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax.checkpoint import (
    Cartridge,
    CartridgeMetadata,
    CorpusSource,
    load_cartridge,
    save_cartridge,
)
from cartridges_jax.corpus.chunks import Chunk, token_coverage
from cartridges_jax.corpus.questions import Question, questions_hash
from cartridges_jax.data.decontaminate import Split, split_conversations
from cartridges_jax.data.examples import render_example
from cartridges_jax.data.packing import check_rows
from cartridges_jax.data.schema import Conversation
from cartridges_jax.distill.initialise import initialise_from_first_tokens
from cartridges_jax.distill.learner import make_learner
from cartridges_jax.distill.sharding import undivided_slots
from cartridges_jax.distill.trainer import StopRequested, train
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import conditions
from cartridges_jax.evaluation.evaluate import evaluate
from cartridges_jax.evaluation.report import print_summary, write_report
from cartridges_jax.models import Model, load_model
from cartridges_jax.models.sharding import undivided
from cartridges_jax.parallel import ALONE, Job, make_mesh, row_parts
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.inputs import check_paths, freeze_questions, read_inputs
from cartridges_jax.pipeline.preflight import longest_evaluated, refuse_what_cannot_work
from cartridges_jax.pipeline.progress import progress
from cartridges_jax.pipeline.signals import StopSignals
from cartridges_jax.pipeline.workdir import Stage, Workdir, code_hash
from cartridges_jax.selfstudy.plan import askable_sentences
from cartridges_jax.selfstudy.synthesis import synthesise

# The source files that a stage's outcome depends on.
_MODEL_CODE = (
    "cartridge.py",
    "rope.py",
    "quantized.py",
    "parallel/constraints.py",
    "parallel/mesh.py",
    "parallel/placement.py",
    "parallel/rules.py",
    "attention",
    "models",
    "formats",
    "text",
    "sampling",
)
_STUDY_CODE = (*_MODEL_CODE, "corpus", "data", "selfstudy")
_TRAIN_CODE = (*_STUDY_CODE, "distill", "checkpoint")
_EVALUATE_CODE = (
    *_TRAIN_CODE,
    "evaluation/conditions.py",
    "evaluation/evaluate.py",
    "evaluation/metrics.py",
    "evaluation/scoring.py",
)
_CODE = {"study": _STUDY_CODE, "train": _TRAIN_CODE, "evaluate": _EVALUATE_CODE}


def _print_at_once(text: str) -> None:
    # A log that a scheduler reads is a pipe, and this process may be ended from outside.
    print(text, flush=True)


def run(
    config: RunConfig, path: Path, *, job: Job = ALONE, say: Callable[[str], None] = _print_at_once
) -> dict[str, Any] | None:
    """Takes a document to a cartridge and its report, or takes up where a run was stopped.

    Args:
      config: what to do.
      path: the workdir; `cartridge/`, `report.json` and `report.html` end up there.
      job: the processes that do it together; each calls this function.
      say: is told what happens, in the first process.

    Returns:
      The report, in the first process.

    Raises:
      UserError: bad input, found before expensive work where that is possible.
      Interrupted: SIGINT or SIGTERM came; the same call goes on from there.
    """
    config.check()
    # One choice for all hosts, whose processors may differ.
    config = dataclasses.replace(config, weights=job.from_first(lambda: config.with_weights_chosen().weights))
    check_paths(config)
    mesh = make_mesh(config.mesh)
    if mesh is None and job.num_processes > 1:
        raise UserError(f"{job.num_processes} processes need a mesh over their devices, such as --config.mesh=data:-1")
    check_rows(config.train.rows_per_step, config.train.micro_batches, row_parts(mesh))
    workdir = Workdir(path, job)
    if not job.is_first:
        say = _say_nothing
    with workdir.held(), StopSignals(job) as signals:
        if job.num_processes > 1:
            say(f"{job.num_processes} processes")
        kept = f", its matrices in {config.weights}" if config.weights else ""
        say(f"loading {config.model} in {config.dtype}{kept}")
        model = load_model(
            config.model,
            dtype=config.dtype,
            weights=config.weights,
            thinking=config.thinking,
            windows_see_prefix=config.windows_see_prefix,
            accept_license=config.accept_license,
            mesh=mesh,
        )
        if mesh is not None:
            say(f"{mesh.size} devices: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)}")
            for words in undivided(model.config, mesh) + undivided_slots(config.cartridge.num_slots, mesh):
                say(words)
        signals.check()
        return _Run(config, workdir, model, job, signals, say).report()


def _say_nothing(text: str) -> None:
    """What other processes than the first do with what the first one says."""


class _Run:
    """The stages of one run, in order; each asks for what it needs from those before."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Workdir,
        model: Model,
        job: Job,
        signals: StopSignals,
        say: Callable[[str], None],
    ):
        self.config, self.workdir, self.model, self.job, self.signals, self.say = (
            config,
            workdir,
            model,
            job,
            signals,
            say,
        )
        self.document, self.questions = read_inputs(config, model.tokenizer)
        self.document_tokens = len(model.tokenizer.encode(self.document.text))
        # Now, because the files may change under a long run.
        self._code = {name: code_hash(*parts) for name, parts in _CODE.items()}
        refuse_what_cannot_work(config, model, self.document, self.questions, workdir)
        if job.is_first:
            freeze_questions(workdir, self.questions)
        say(
            f"{self.document.name}: {self.document_tokens:,} tokens, {len(self.questions)} questions; "
            f"cartridge of {config.cartridge.num_slots} slots"
        )

    def _open(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        stage, changes = self.workdir.stage(name, inputs)
        if stage.done:
            self.say(f"{name}: nothing changed, kept")
        elif changes:
            self.say(f"{name}: runs again, changed: {'; '.join(changes)}")
        elif stage.spent():
            self.say(f"{name}: goes on after {stage.spent():.0f} s of earlier work")
        return stage

    # The mesh is no input of any stage: what it changes is the order of sums, in the last digits, and nobody
    # would want another cartridge because the devices are others. A stage may end on another mesh than it began on.
    def _study_stage(self) -> Stage:
        return self._open(
            "study",
            {
                "seed": self.config.seed,
                "model": self.model.source_sha256,
                "dtype": self.config.dtype,
                "weights": self.config.weights,
                "thinking": self.config.thinking,
                "windows_see_prefix": self.config.windows_see_prefix,
                "document": self.document.sha256,
                "code": self._code["study"],
                **_flat("study", self.config.study),
            },
        )

    def study(self) -> tuple[Stage, list[Conversation]]:
        """Self-study; finished shards are read back."""
        stage = self._study_stage()

        def converse(**callbacks) -> list[Conversation]:
            return synthesise(
                self.model,
                self.document,
                stage.directory,
                self.config.study,
                seed=self.config.seed,
                job=self.job,
                **callbacks,
            )

        if stage.done:
            return stage, converse()
        with stage.clock() as clock, self._bar("study", self.config.study.conversations) as bar:

            def heartbeat() -> None:
                clock.tick()
                self.signals.check()

            conversations = converse(on_progress=bar.at, heartbeat=heartbeat)
        stage.finish({"conversations": len(conversations)})
        return stage, conversations

    def _bar(self, name: str, total: int):
        return progress(name, total, shown=self.job.is_first)

    def _split(self, conversations: list[Conversation]) -> Split:
        return split_conversations(
            [[m.content for m in conversation.messages if m.role == "user"] for conversation in conversations],
            [question.question for question in self.questions],
            self.config.heldout,
            np.random.default_rng([self.config.seed, 1]),
        )

    def train(self, study: Stage, conversations: list[Conversation]) -> tuple[Stage, Cartridge]:
        """Distillation; a finished cartridge is read back."""
        config = self.config
        stage = self._open(
            "train",
            {
                "study": study.key,
                "seed": config.seed,
                "heldout": config.heldout,
                "questions": questions_hash(self.questions),
                "code": self._code["train"],
                **_flat("cartridge", config.cartridge),
                **_flat("train", config.train),
            },
        )
        directory = stage.directory / "cartridge"
        if not stage.done:
            with stage.clock() as clock:
                self._train(stage, conversations, directory, clock)
        try:
            cartridge = load_cartridge(directory)
        except UserError as error:
            raise UserError(f"{error} (to train it again, delete {stage.directory})") from None
        if self.job.is_first:
            self._publish(stage, cartridge)
        return stage, cartridge

    def _train(self, stage: Stage, conversations: list[Conversation], directory: Path, clock) -> None:
        config, model = self.config, self.model
        split = self._split(conversations)
        if not split.training:
            raise UserError(
                f"of {len(conversations)} conversations {split.dropped['like_evaluation']} equal evaluation questions and the others are held "
                "out: raise study.conversations"
            )
        chat = model.chat
        initial = initialise_from_first_tokens(model, self.document.text, config.cartridge.num_slots)
        with self._bar("train", config.train.steps) as bar:

            def on_step(step: int, loss: float | None) -> None:
                bar.at(step, note="" if loss is None else f"loss {loss:.3f}")
                clock.tick()

            try:
                result = train(
                    model,
                    initial,
                    [render_example(conversations[i], chat, targets=config.train.targets) for i in split.training],
                    [render_example(conversations[i], chat) for i in split.heldout],
                    config.train,
                    stage.directory / "checkpoints",
                    learner=make_learner(config.train.learner, num_frozen=config.cartridge.num_frozen),
                    seed=config.seed,
                    job=self.job,
                    on_step=on_step,
                    should_stop=self.signals.requested,
                )
            except StopRequested:
                self.signals.check()
                raise
        metadata = CartridgeMetadata.of(
            result.prefix,
            model_name=model.name,
            model_fingerprint=model.fingerprint,
            learning_mask=np.arange(config.cartridge.num_slots) >= config.cartridge.num_frozen,
            corpus=CorpusSource(self.document.name, self.document.sha256, self.document_tokens),
            step=config.train.steps,
            config=dataclasses.asdict(config),
        )
        if self.job.is_first:
            save_cartridge(directory, result.prefix, metadata)
        stage.finish(
            {
                "history": result.history,
                "refused_steps": result.refused,
                "dropped_training_questions": split.dropped["like_evaluation"],
                "dropped_heldout_conversations": split.dropped["like_training"],
                "heldout": len(split.heldout),
                "trained_on": len(split.training),
                "packing_efficiency": result.packing_efficiency,
                "epochs": result.epochs,
            }
        )

    def _publish(self, stage: Stage, cartridge: Cartridge) -> None:
        """Puts the stage's cartridge where users look for it, unless it lies there."""
        target = self.workdir.path / "cartridge"
        marker = stage.directory.parent / "published"
        if target.exists() and marker.exists() and marker.read_text() == stage.key:
            return
        marker.unlink(missing_ok=True)
        save_cartridge(target, cartridge.prefix, cartridge.metadata)
        marker.write_text(stage.key)

    def evaluate(self, train_stage: Stage, cartridge: Cartridge, conversations: list[Conversation]) -> Stage:
        """The four conditions on the same questions."""
        config = self.config
        questions = self._asked()
        stage = self._open(
            "evaluate",
            {
                "train": train_stage.key,
                "questions": questions_hash(questions),
                "code": self._code["evaluate"],
                **_flat("evaluation", config.evaluation),
            },
        )
        if stage.done:
            return stage
        heldout = [conversations[i] for i in self._split(conversations).heldout]
        with stage.clock() as clock, self._bar("evaluate", 1) as bar:

            def advance(done: int, total: int) -> None:
                bar.at(done, total)
                clock.tick()
                self.signals.check()

            fronts, cut = conditions(
                self.model, self.document, cartridge.prefix, room=longest_evaluated(config, self.model, self.questions)
            )
            measured = evaluate(self.model, fronts, questions, heldout, config.evaluation, on_progress=advance)
        stage.finish({**dataclasses.asdict(measured), "cut_from_icl": cut})
        return stage

    def _asked(self) -> list[Question]:
        limit = self.config.evaluation.max_questions
        if not limit or len(self.questions) <= limit:
            return self.questions
        places = np.linspace(0, len(self.questions) - 1, limit).round().astype(int)
        return [self.questions[i] for i in places]

    def report(self) -> dict[str, Any] | None:
        """Runs what is missing and writes the report."""
        study_stage, conversations = self.study()
        train_stage, cartridge = self.train(study_stage, conversations)
        evaluate_stage = self.evaluate(train_stage, cartridge, conversations)
        if not self.job.is_first:
            return None
        trained, measured = train_stage.result(), evaluate_stage.result()
        seconds = {
            "synthesis": study_stage.spent(),
            "training": train_stage.spent(),
            "evaluation": evaluate_stage.spent(),
        }
        document_judge = "the model with the whole document in context"
        if measured["cut_from_icl"]:
            document_judge += f" (its last {measured['cut_from_icl']} tokens did not fit and were cut)"
        report = {
            "model": self.model.name,
            "model_fingerprint": self.model.fingerprint,
            "seed": self.config.seed,
            "corpus": {
                "name": self.document.name,
                "tokens": self.document_tokens,
                "sha256": self.document.sha256,
            },
            "cartridge": {
                "tokens": cartridge.prefix.num_slots,
                "bytes": cartridge.prefix.nbytes,
                "frozen": cartridge.metadata.num_frozen,
            },
            "conditions": measured["conditions"],
            **measured["closed"],
            "reasons": measured["reasons"],
            "dropped_training_questions": trained["dropped_training_questions"],
            "seconds": {**seconds, "total": sum(seconds.values())},
            "conversations": trained["trained_on"],
            "dropped_heldout_conversations": trained["dropped_heldout_conversations"],
            "heldout_conversations": trained["heldout"],
            "steps": self.config.train.steps,
            "refused_steps": trained["refused_steps"],
            "packing_efficiency": trained["packing_efficiency"],
            "epochs": trained["epochs"],
            "questions": len(self._asked()),
            "questions_sha256": questions_hash(self.questions),
            "judge": document_judge,
            "trained_by": f"the model with the {self.config.study.teacher_context} in context",
            "coverage": self._coverage(conversations),
            "history": trained["history"],
            "answers": measured["answers"],
            "config": dataclasses.asdict(self.config),
        }
        _, page = write_report(self.workdir.path, report)
        print_summary(report, page)
        self.say(f"Cartridge: {self.workdir.path / 'cartridge'}")
        return report

    def _coverage(self, conversations: list[Conversation]) -> dict[str, Any]:
        counts = np.zeros(len(askable_sentences(self.document.text)), int)
        for conversation in conversations:
            counts[conversation.metadata["sentence_index"]] += 1
        chunks = {tuple(conversation.metadata["chunk_span"]) for conversation in conversations}
        return {
            "sentences": len(counts),
            "asked": int((counts > 0).sum()),
            "conversations_per_sentence": counts.tolist(),
            "tokens": token_coverage([Chunk(*span) for span in sorted(chunks)], self.document_tokens),
        }


def _flat(name: str, settings: Any) -> dict[str, Any]:
    return {f"{name}.{field}": value for field, value in dataclasses.asdict(settings).items()}
