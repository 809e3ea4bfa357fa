"""Evaluation tasks: one file each, registered by name.

A new task is a class with `name`, `metrics`, `examples` and `score`, decorated with `register`; reports show its metrics
without any change.
"""

from cartridges_jax.evaluation.tasks import heldout, questions  # noqa: F401  (registers its members)
from cartridges_jax.evaluation.tasks.task import (
    TASKS,
    Example,
    Metric,
    Task,
    TaskInputs,
    check_task,
    make_tasks,
    register,
)

__all__ = ["TASKS", "Example", "Metric", "Task", "TaskInputs", "check_task", "make_tasks", "register"]
