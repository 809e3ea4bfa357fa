"""The state that the stages of one run share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.corpus.questions import Question
from cartridges_jax.models import Model
from cartridges_jax.parallel import Job
from cartridges_jax.pipeline.config import RunConfig
from cartridges_jax.pipeline.reporting import Progress, Reporter
from cartridges_jax.pipeline.signals import NeverStops
from cartridges_jax.pipeline.workdir import Stage, Workdir, code_hash, library_versions

if TYPE_CHECKING:
    from cartridges_jax.pipeline.budget import Budget

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
_TRAIN_CODE = (*_STUDY_CODE, "prefixes", "distill", "checkpoint", "pipeline/distillation.py")
_EVALUATE_CODE = (
    *_TRAIN_CODE,
    "evaluation/conditions.py",
    "evaluation/evaluate.py",
    "evaluation/measuring.py",
    "evaluation/metrics.py",
    "evaluation/results.py",
    "evaluation/scoring.py",
    "evaluation/tasks",
)
_CODE = {"study": _STUDY_CODE, "train": _TRAIN_CODE, "evaluate": _EVALUATE_CODE}


@dataclasses.dataclass(frozen=True)
class RunContext:
    """The inputs of a run, and where and by whom it is carried out.

    Attributes:
      config: the run's settings, with every "auto" resolved.
      workdir: the run's directory.
      model: the frozen model.
      corpus: the documents, in tokens.
      questions: human questions about them; may be empty.
      job: the processes that take part.
      stop: tells whether the run was asked to stop.
      reporter: receives messages and progress; silent in every process but process 0.
      budget: what fits the run into `budget_minutes`; None without a budget.
      code: stage to the hash of the code that its outcome depends on.
    """

    config: RunConfig
    workdir: Workdir
    model: Model
    corpus: TokenizedCorpus
    questions: list[Question]
    job: Job
    stop: NeverStops
    reporter: Reporter
    budget: Budget | None = None
    # Hashed at the start, because the files may change under a long run.
    code: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {name: code_hash(*parts) for name, parts in _CODE.items()}
    )

    def open(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The stage with these inputs; reports whether it is done, resumed or run again."""
        stage, changes = self.workdir.stage(name, {"code": self.code[name], **library_versions(), **inputs})
        if stage.done:
            self.reporter.say(f"{name}: nothing changed, skipped")
        elif changes:
            self.reporter.say(f"{name}: runs again, changed: {'; '.join(changes)}")
        elif stage.spent():
            self.reporter.say(f"{name}: resumes after {stage.spent():.0f} s of earlier work")
        return stage

    def progress(self, name: str, total: int) -> AbstractContextManager[Progress]:
        """The progress of a stage."""
        return self.reporter.progress(name, total)


def flat(name: str, settings: Any) -> dict[str, Any]:
    """Settings as flat stage inputs: "name.field" to a JSON value."""
    # JSON has no tuples, and a stage compares its inputs with recorded ones.
    return {
        f"{name}.{field}": list(value) if isinstance(value, tuple) else value
        for field, value in dataclasses.asdict(settings).items()
    }
