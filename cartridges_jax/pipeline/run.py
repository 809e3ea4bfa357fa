"""A run: study, train, evaluate and report, each stage skipped when its inputs' hash is unchanged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cartridges_jax.data.packing import check_rows
from cartridges_jax.distill.sharding import undivided_slots
from cartridges_jax.errors import UserError
from cartridges_jax.models import load_model
from cartridges_jax.models.sharding import undivided
from cartridges_jax.parallel import ALONE, Job, make_mesh, row_parts
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.inputs import freeze_questions, read_inputs, tokenized_inputs
from cartridges_jax.pipeline.preflight import refuse_what_cannot_work
from cartridges_jax.pipeline.reporting import Reporter
from cartridges_jax.pipeline.signals import NeverStops
from cartridges_jax.pipeline.sizes import plan_line, with_sizes
from cartridges_jax.pipeline.stages.context import RunContext
from cartridges_jax.pipeline.stages.evaluate import evaluate
from cartridges_jax.pipeline.stages.report import report
from cartridges_jax.pipeline.stages.study import study
from cartridges_jax.pipeline.stages.train import train
from cartridges_jax.pipeline.workdir import Workdir

_SILENT = Reporter()


def run(
    config: RunConfig,
    path: Path,
    *,
    job: Job = ALONE,
    reporter: Reporter = _SILENT,
    stopping: type[NeverStops] = NeverStops,
) -> dict[str, Any] | None:
    """Turns a corpus into a cartridge and its report, or resumes a run that was stopped.

    Args:
      config: the run's settings.
      path: the workdir; `cartridge/`, `report.json` and `report.html` end up there.
      job: the processes that take part; each calls this function.
      reporter: receives messages and progress, in process 0.
      stopping: how the run may be stopped; `StopSignals` by SIGINT and SIGTERM.

    Returns:
      The report, in process 0.

    Raises:
      UserError: bad input, found before expensive work where that is possible.
      Interrupted: SIGINT or SIGTERM came; the same call resumes.
    """
    config.check()
    inputs = read_inputs(config)
    # One choice for all hosts, whose processors may differ.
    config = dataclasses.replace(config, weights=job.from_first(lambda: config.with_weights_chosen().weights))
    mesh = make_mesh(config.mesh)
    if mesh is None and job.num_processes > 1:
        raise UserError(f"{job.num_processes} processes need a mesh over their devices, such as --config.mesh=data:-1")
    check_rows(config.train.rows_per_step, config.train.micro_batches, row_parts(mesh))
    workdir = Workdir(path, job)
    if not job.is_first:
        reporter = _Nowhere()
    say = reporter.say
    with workdir.held(), stopping(job) as stop:
        if job.num_processes > 1:
            say(f"{job.num_processes} processes")
        stored = f", weights stored in {config.weights}" if config.weights else ""
        say(f"loading {config.model} in {config.dtype}{stored}")
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
        stop.check()
        corpus, questions = tokenized_inputs(inputs, config, model.tokenizer)
        config = with_sizes(config, corpus)
        if mesh is not None:
            for words in undivided(model.config, mesh) + undivided_slots(config.cartridge.num_slots, mesh):
                say(words)
        refuse_what_cannot_work(config, model, corpus, questions, workdir)
        context = RunContext(config, workdir, model, corpus, questions, job, stop, reporter)
        if job.from_first(lambda: freeze_questions(workdir, questions, new_evaluation=config.new_evaluation)):
            say("new evaluation: this workdir held other evaluation questions before")
        say(plan_line(config, model.config, corpus, len(questions)))
        return _stages(context)


def _stages(run: RunContext) -> dict[str, Any] | None:
    """Runs the stages that are missing, in order."""
    study_stage, conversations = study(run)
    train_stage, cartridge = train(run, study_stage, conversations)
    evaluate_stage = evaluate(run, train_stage, cartridge, conversations)
    if not run.job.is_first:
        return None
    return report(run, study_stage, train_stage, evaluate_stage, conversations, cartridge)


class _Nowhere(Reporter):
    """The reporter of every process but process 0."""

    def say(self, text: str) -> None:
        pass
