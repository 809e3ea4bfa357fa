"""The protocol of evaluation tasks and their registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cartridges_jax.corpus import TokenizedCorpus
from cartridges_jax.corpus.questions import Question
from cartridges_jax.data.schema import Conversation
from cartridges_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that conditions are compared by, and how a report shows it.

    Attributes:
      name: its key in `report.json` and its column in `answers.parquet`.
      title: its column heading.
      higher_is_better: its direction.
      format: a format specification (".3f"), or one of "count", "bytes" and "percent".
      unit: the unit, for captions; "" for a plain number.
      aggregate: "mean" or "sum" of the examples' values.
      featured: whether figures and the printed summary show it; the table shows all metrics.
      mark: for a score of one answer, the meaning of a check mark beside an answer whose score is positive; "" for none.
      note: one sentence that explains the number; "" for none.
    """

    name: str
    title: str
    higher_is_better: bool = True
    format: str = ".2f"
    unit: str = ""
    aggregate: str = "mean"
    featured: bool = True
    mark: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to ask the model.

    Attributes:
      id: unique within its task.
      messages: {"role", "content"} up to the message that is to be answered, without a system message.
      references: the answers that count as right, the first of which is also scored by its likelihood.
      choices: the options of a multiple-choice question.
      evidence: the passage that holds the answer, where it is known.
      given_ids: tokens of a given answer, on which the conditions' distributions are compared.
      is_answered: whether every condition answers freely; False for examples that only compare distributions.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    evidence: str | None = None
    given_ids: tuple[int, ...] = ()
    is_answered: bool = True

    @property
    def question(self) -> str:
        """The message that is to be answered."""
        return self.messages[-1]["content"]


class Task(Protocol):
    """Examples, and scores for the answers to them.

    The evaluation itself measures likelihoods and divergences on every task's examples; a task only scores texts. A
    task may also have an attribute `missing`, the reason that reports give where it has no examples.

    Attributes:
      name: its name in the registry.
      metrics: the scores that `score` returns.
      examples: the examples, in order; may be empty.
    """

    name: str
    metrics: tuple[Metric, ...]
    examples: Sequence[Example]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Returns metric name to score of one free answer; metrics that do not apply are left out."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskInputs:
    """The material that tasks are made from.

    Attributes:
      corpus: the documents that the cartridge holds.
      questions: human questions about them; may be empty.
      heldout: self-study conversations that were not trained on; may be empty.
    """

    corpus: TokenizedCorpus
    questions: Sequence[Question] = ()
    heldout: Sequence[Conversation] = ()


# Called with the inputs and, for a name such as "longhealth:patient_03", the text after the colon.
TaskMaker = Callable[..., Task]
TASKS: dict[str, TaskMaker] = {}


def register(name: str) -> Callable[[TaskMaker], TaskMaker]:
    """Adds a task to the registry: decorates a callable `(inputs: TaskInputs) -> Task`.

    Raises:
      ValueError: the name is taken.
    """

    def add(make: TaskMaker) -> TaskMaker:
        if name in TASKS:
            raise ValueError(f"there is already an evaluation task {name!r}")
        TASKS[name] = make
        return make

    return add


def check_task(name: str) -> None:
    """Raises UserError for a name that no task has."""
    if name.partition(":")[0] not in TASKS:
        raise UserError(f"evaluation task {name!r}: choose among {', '.join(sorted(TASKS))}")


def make_tasks(names: Sequence[str], inputs: TaskInputs) -> list[Task]:
    """Returns the tasks with the given names, which may carry an argument after a colon.

    Raises:
      UserError: an unknown name.
    """
    tasks = []
    for name in names:
        check_task(name)
        kind, _, argument = name.partition(":")
        tasks.append(TASKS[kind](inputs, *([argument] if argument else [])))
    return tasks
