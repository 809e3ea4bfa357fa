"""The summary of a report as text, for terminals and logs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cartridges_jax.evaluation.report import complete_report, memory_ratio, of_role
from cartridges_jax.evaluation.units import format_percent, format_ratio, format_value

COLUMNS = 100
# Shown behind the featured metrics: the price of each condition.
_SIZES = ("prefix_tokens", "kv_bytes")


def format_summary(report: Mapping[str, Any], html_path: str | Path | None = None, *, answers: int = 3) -> str:
    """A table of the conditions, the headline, a few questions answered side by side, and the place of the page.

    Returns:
      Text of at most 100 columns; metrics that do not fit into the table are left out.
    """
    report = complete_report(report)
    conditions = report["condition_list"]
    width = max(len(condition["title"]) for condition in conditions)
    lines = comparison_table(conditions, report["metric_list"], report["conditions"]).split("\n")
    lines += ["", *textwrap.wrap(headline(report), COLUMNS)]
    for item in report["answers"][:answers]:
        lines += ["", _clip(f"Q  {item['question']}")]
        lines += [_clip(f"   {'reference'.ljust(width)}  {' / '.join(item['references'])}")]
        for condition in conditions:
            lines += [_clip(f"   {condition['title'].ljust(width)}  {item['answers'][condition['name']] or '—'}")]
    if html_path is not None:
        lines += ["", f"Report: {html_path}"]
    return "\n".join(lines)


def comparison_table(
    conditions: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    values: Mapping[str, Mapping[str, float | None]],
) -> str:
    """A row per condition and a column per featured metric, at most 100 columns wide.

    Args:
      conditions: `condition_list` of an evaluation.
      metrics: its `metric_list`; those that do not fit are left out.
      values: condition to metric to value.
    """
    titles = ["", *(condition["title"] for condition in conditions)]
    width = max(map(len, titles))
    lines = [title.ljust(width) for title in titles]
    for metric in metrics:
        if not metric["featured"] and metric["name"] not in _SIZES:
            continue
        cells = [metric["title"]]
        cells += [format_value(metric, values[condition["name"]][metric["name"]]) for condition in conditions]
        wide = max(map(len, cells))
        if len(lines[0]) + 2 + wide > COLUMNS:
            break
        lines = [f"{line}  {cell.rjust(wide)}" for line, cell in zip(lines, cells)]
    lines = [line.rstrip() for line in lines]
    lines.insert(1, "─" * max(map(len, lines)))
    return "\n".join(lines)


def headline(report: Mapping[str, Any]) -> str:
    """The fraction of the gap that the cartridge closes, the facts it answers, and its memory, in a sentence or two."""
    closed, facts, ratio = report["kl_closed"], report["facts"], memory_ratio(report)
    if closed is None:
        said = f"The fraction of the gap that the cartridge closes is undefined: {report['reasons']['kl_closed']}."
    else:
        said = f"The cartridge closes {format_percent(closed)} of the gap to the whole text{beside(report)}"
        said += "." if ratio is None else f", with {format_ratio(ratio)} KV memory."
    return (
        said if facts is None else f"{said} {facts:.0f} of its {report['questions']} answers hold the fact asked for."
    )


def beside(report: Mapping[str, Any]) -> str:
    """The gap that the other conditions close, as " (First tokens: 39 %)"; empty where there are none."""
    others = [
        f"{condition['title']}: {format_percent(report['conditions'][condition['name']]['kl_closed'])}"
        for condition in report["condition_list"]
        if not condition["role"] and report["conditions"][condition["name"]].get("kl_closed") is not None
    ]
    return f" ({', '.join(others)})" if others and of_role(report, "subject") else ""


def _clip(line: str) -> str:
    line = " ".join(line.splitlines())
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…"
