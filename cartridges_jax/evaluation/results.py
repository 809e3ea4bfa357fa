"""Rows of single examples to the numbers of a report, and to a Parquet file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cartridges_jax.evaluation.conditions import BASELINE, JUDGE, Condition
from cartridges_jax.evaluation.measuring import TOKEN_MEASURES
from cartridges_jax.evaluation.metrics import closed_fraction
from cartridges_jax.evaluation.tasks import Metric, Task
from cartridges_jax.files import write_atomically

# Examples in report.json; all of them are in the Parquet file.
SHOWN_ANSWERS = 24

_NO_QUESTIONS = "no human questions were given"
_PER_TOKEN = {
    metric.name: metric
    for metric in (
        Metric(
            "teacher_kl",
            "KL to whole text",
            higher_is_better=False,
            format=".3f",
            unit="nats per token",
            note="KL to whole text compares next-token distributions with those of the model that has the whole text in "
            "context, on that model’s own answers.",
        ),
        Metric(
            "heldout_kl",
            "KL, held-out",
            higher_is_better=False,
            format=".3f",
            unit="nats per token",
            featured=False,
            note="Held-out is the same on self-study conversations kept out of training.",
        ),
        Metric(
            "answer_nll",
            "Answer NLL",
            higher_is_better=False,
            format=".3f",
            unit="nats per token",
            note="Answer NLL is the negative log-likelihood of the reference answers, the end of the turn included.",
        ),
        Metric(
            "own_nll",
            "Own-answer NLL",
            higher_is_better=False,
            format=".3f",
            unit="nats per token",
            featured=False,
            note="Own-answer NLL is the negative log-likelihood, under the model with the whole text in context, of the "
            "answers that each condition writes freely.",
        ),
    )
}
_UNDEFINED = {
    "teacher_kl": _NO_QUESTIONS,
    "answer_nll": _NO_QUESTIONS,
    "heldout_kl": "no self-study conversations were held out",
    "own_nll": "no answers were written",
}
KL_CLOSED = Metric(
    "kl_closed",
    "KL gap closed",
    format="percent",
    featured=False,
    note="Gap closed is 0 % for no document and 100 % for the whole text, in KL or in the loss on reference answers.",
)
GAP_CLOSED = Metric("gap_closed", "NLL gap closed", format="percent", featured=False)
PREFIX_TOKENS = Metric("prefix_tokens", "Slots", higher_is_better=False, format="count", featured=False)
KV_BYTES = Metric("kv_bytes", "KV memory", higher_is_better=False, format="bytes", featured=False)

Measures = dict[str, dict[str, float | None]]


def summarise(
    rows: Sequence[dict[str, Any]], conditions: Sequence[Condition], tasks: Sequence[Task]
) -> tuple[Measures, list[Metric], dict[str, str]]:
    """Aggregates rows.

    Per token: a mean over the tokens of all examples. Scores: as the metric says. Where several tasks give a metric of
    the same name, the first keeps it and the others' are called `<metric>_<task>`.

    Returns:
      The measures (condition to metric to value), the metrics in order, and dotted path to the reason of every None.
    """
    metrics: dict[str, Metric] = {}
    measures: Measures = {condition.name: {} for condition in conditions}
    reasons: dict[str, str] = {}

    def add(metric: Metric, values: dict[str, float | None], reason: str) -> None:
        metrics[metric.name] = metric
        for condition, value in values.items():
            measures[condition][metric.name] = value
            if value is None:
                reasons[f"conditions.{condition}.{metric.name}"] = reason

    by_task = {
        (task.name, condition.name): [
            row for row in rows if row["task"] == task.name and row["condition"] == condition.name
        ]
        for task in tasks
        for condition in conditions
    }

    def of_task(task: Task, value_of) -> dict[str, float | None]:
        return {condition.name: value_of(by_task[task.name, condition.name]) for condition in conditions}

    later = []
    for name, metric in _PER_TOKEN.items():
        givers = []
        for task in tasks:
            values = of_task(task, lambda members, name=name: _token_mean(members, name))
            if any(value is not None for value in values.values()):
                givers.append((task, values))
        if givers:
            add(metric, givers[0][1], "")
        else:
            add(metric, {condition.name: None for condition in conditions}, _UNDEFINED[name])
        later += [(metric, task, values) for task, values in givers[1:]]
    for task in tasks:
        missing = getattr(task, "missing", f"the task {task.name!r} has no examples")
        reason = "no example has this score" if task.examples else missing
        for metric in task.metrics:
            values = of_task(task, lambda members, metric=metric: _aggregate(members, metric))
            if metric.name in metrics:
                later.append((metric, task, values))
            else:
                add(metric, values, reason)
    for metric, task, values in later:
        title = f"{metric.title} ({task.name})"
        renamed = dataclasses.replace(
            metric, name=f"{metric.name}_{task.name}", title=title, featured=False, mark="", note=""
        )
        add(renamed, values, "no example has this score")
    add(PREFIX_TOKENS, {condition.name: condition.prefix_tokens for condition in conditions}, "")
    add(KV_BYTES, {condition.name: condition.kv_bytes for condition in conditions}, "")
    return measures, list(metrics.values()), reasons


def add_closed(measures: Measures, metrics: list[Metric], reasons: dict[str, str]) -> None:
    """Adds kl_closed and gap_closed to every condition's measures, to the metrics and to the reasons, in place.

    kl_closed is measured on `teacher_kl`, or on `heldout_kl` where that is undefined.
    """
    divergence = "teacher_kl"
    if all(values["teacher_kl"] is None for values in measures.values()):
        divergence = "heldout_kl"
        for number, metric in enumerate(metrics):
            metrics[number] = dataclasses.replace(metric, featured=metric.featured or metric.name == divergence)
    at = next(number for number, metric in enumerate(metrics) if metric.name == PREFIX_TOKENS.name)
    metrics[at:at] = [KL_CLOSED, GAP_CLOSED]
    judged = measures[JUDGE]["answer_nll"]
    for metric, measure, reference in ((KL_CLOSED, divergence, 0.0), (GAP_CLOSED, "answer_nll", judged)):
        for name, values in measures.items():
            path = f"conditions.{name}.{metric.name}"
            if BASELINE not in measures:
                values[metric.name], reason = None, f"the condition {BASELINE!r} was not evaluated"
            elif values[measure] is None:
                values[metric.name], reason = None, reasons[f"conditions.{name}.{measure}"]
            else:
                values[metric.name], reason = closed_fraction(measures[BASELINE][measure], values[measure], reference)
            if values[metric.name] is None:
                reasons[path] = reason


def shown_answers(rows: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The first examples of every task that were answered freely, each with all conditions' answers and scores.

    Returns:
      At most `SHOWN_ANSWERS` dicts {"task", "id", "question", "references", "answers": condition to text, "scores":
      condition to metric to value}.
    """
    answered: dict[str, list[dict[str, Any]]] = {}
    conditions = dict.fromkeys(row["condition"] for row in rows)
    per_condition = {name: [row for row in rows if row["condition"] == name] for name in conditions}
    for together in zip(*per_condition.values()):
        first = together[0]
        if first["answer"] is None:
            continue
        answered.setdefault(first["task"], []).append({
            "task": first["task"],
            "id": first["example_id"],
            "question": first["question"],
            "references": first["references"],
            "answers": {row["condition"]: row["answer"] for row in together},
            "scores": {row["condition"]: row["scores"] for row in together},
        })  # fmt: skip
    share = -(-SHOWN_ANSWERS // max(len(answered), 1))
    return [item for task in tasks for item in answered.get(task.name, ())[:share]]


def write_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes `answers.parquet`, whole or not at all: one row per example and condition.

    Columns: task, example_id, condition, question, references, answer; `<measure>_sum` (nats) and `<measure>_tokens` of
    every measure per token; and one column per score. What does not apply to an example is null.
    """
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    texts = ("task", "example_id", "condition", "question")
    fields = [(name, pa.string()) for name in texts]
    fields += [("references", pa.list_(pa.string())), ("answer", pa.string())]
    for measure in TOKEN_MEASURES:
        fields += [(f"{measure}_sum", pa.float64()), (f"{measure}_tokens", pa.int32())]
    fields += [(name, pa.float64()) for name in scores]
    table = pa.Table.from_pylist(
        [{**row, **row["scores"]} for row in rows],
        pa.schema(fields),
    )
    write_atomically(path, lambda file: pq.write_table(table, file))


def _token_mean(rows: Sequence[dict[str, Any]], measure: str) -> float | None:
    measured = [row for row in rows if row.get(f"{measure}_tokens")]
    if not measured:
        return None
    return sum(row[f"{measure}_sum"] for row in measured) / sum(row[f"{measure}_tokens"] for row in measured)


def _aggregate(rows: Sequence[dict[str, Any]], metric: Metric) -> float | None:
    values = [row["scores"][metric.name] for row in rows if metric.name in row["scores"]]
    if not values:
        return None
    return sum(values) if metric.aggregate == "sum" else sum(values) / len(values)
