"""Self-study: the corpus to conversations."""

from __future__ import annotations

from cartridges_jax.data.schema import Conversation
from cartridges_jax.pipeline.stages.context import RunContext, flat
from cartridges_jax.pipeline.workdir import Stage
from cartridges_jax.selfstudy.synthesis import Study, synthesise


# The mesh is not an input of any stage: it changes the order of sums, in the last digits only, and a stage may
# finish on another mesh than it began on.
def study(run: RunContext) -> tuple[Stage, list[Conversation]]:
    """Runs self-study, or reads a finished study's shards back."""
    config = run.config
    stage = run.open("study", {
        "seed": config.seed,
        "model": run.model.source_sha256,
        "dtype": config.dtype,
        "weights": config.weights,
        "thinking": config.thinking,
        "windows_see_prefix": config.windows_see_prefix,
        "corpus": run.corpus.sha256,
        "documents": _ids_of_several(run),
        **flat("study", config.study),
        # Here, because it decides where the study ends.
        **({"budget_minutes": config.budget_minutes} if config.budget_minutes else {}),
    })  # fmt: skip
    limits = {} if run.budget is None else run.budget.study_limits(stage)

    def converse(**callbacks) -> Study:
        return synthesise(
            run.model, run.corpus, stage.directory, config.study, seed=config.seed, job=run.job, **limits, **callbacks
        )

    if stage.done:
        return stage, converse().conversations
    with stage.clock() as clock, run.progress("study", config.study.conversations) as bar:

        def heartbeat() -> None:
            clock.tick()
            run.stop.check()

        studied = converse(on_progress=bar.at, heartbeat=heartbeat, warn=run.reporter.say)
    stage.finish(studied.counts)
    return stage, studied.conversations


def _ids_of_several(run: RunContext) -> list[str]:
    """The documents' ids, which conversations carry; empty for a single document, whatever its file is called."""
    ids = [document.document.id for document in run.corpus.documents]
    return ids if len(ids) > 1 else []
