"""The files of a report: `report.json` (numbers) and `report.html` (the same, to look at).

The report is a dict; `_REQUIRED` lists its keys. Losses are nats per token, sizes bytes, times seconds. It names its
conditions and metrics itself (`condition_list`, `metric_list`), and everything that shows a report follows these lists. A
number that is undefined is null, and `reasons` says why under its dotted path: {"conditions.none.f1": "no answers"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax.files import write_atomically

HEADLINE = ("kl_closed", "gap_closed", "facts")

_REQUIRED: dict[str, Sequence[str]] = {
    "": (
        "model model_fingerprint seed corpus cartridge conditions condition_list metric_list kl_closed gap_closed facts "
        "dropped_training_questions dropped_heldout_conversations seconds conversations heldout_conversations study steps "
        "refused_steps questions questions_sha256 replaced_questions examples judge trained_by coverage history answers "
        "answers_file config"
    ).split(),
    "corpus": ("name", "tokens", "sha256", "documents"),
    "cartridge": ("tokens", "bytes", "frozen"),
    "seconds": ("synthesis", "training", "evaluation", "total"),
    "study": ("asked", "conversations", "dropped"),
    "coverage": ("sentences", "asked", "conversations_per_sentence", "tokens"),
    "history": ("train", "heldout"),
}
_CONDITION_KEYS = ("name", "title", "role")
_METRIC_KEYS = ("name", "title", "higher_is_better", "format", "unit", "featured", "mark", "note")
_ANSWER_KEYS = ("question", "references", "answers", "scores")


def write_report(workdir: str | Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `workdir`, each whole or not at all.

    NaN and infinities become null with a reason; a null number of a condition that came without one gets one that says so.

    Returns:
      The paths of the JSON and the HTML file.

    Raises:
      ValueError: if the report lacks a key; the message lists every one that is missing.
      TypeError: if it holds something JSON cannot.
    """
    # Only here: the page needs the drawing library, which a summary can do without.
    from cartridges_jax.evaluation.page import render_html

    report = complete_report(report)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    json_path, html_path = workdir / "report.json", workdir / "report.html"
    write_atomically(json_path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(html_path, render_html(report))
    return json_path, html_path


def complete_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report as plain JSON values, checked, with a reason beside every number that is undefined."""
    reasons = dict(report.get("reasons") or {})
    plain = _plain({key: value for key, value in report.items() if key != "reasons"}, "", reasons)
    if missing := list(_missing_keys(plain)):
        raise ValueError(
            f"the report lacks {', '.join(missing)}; an undefined number is None with an entry in 'reasons'"
        )
    numbers = {name: plain[name] for name in HEADLINE} | {"coverage.tokens": plain["coverage"]["tokens"]}
    for condition, values in plain["conditions"].items():
        numbers |= {f"conditions.{condition}.{metric}": value for metric, value in values.items()}
    for path, value in numbers.items():
        if value is None:
            reasons.setdefault(path, "no reason was recorded")
    return {**plain, "reasons": reasons}


def of_role(report: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """The entry of `condition_list` with this role, or None."""
    return next((condition for condition in report["condition_list"] if condition["role"] == role), None)


def memory_ratio(report: Mapping[str, Any]) -> float | None:
    """The judge's bytes divided by the cartridge's; None where a size is unknown."""
    judge, small = of_role(report, "judge"), report["cartridge"]["bytes"]
    whole = report["conditions"][judge["name"]].get("kv_bytes") if judge else None
    return whole / small if whole and small else None


def _plain(value: Any, path: str, reasons: dict[str, str]) -> Any:
    """The same as JSON values: NumPy's types, paths and tuples converted, what is not finite null with a reason."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}".lstrip("."), reasons) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), path, reasons)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}.{index}", reasons) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        reasons.setdefault(path, f"the value was not finite ({value})")
        return None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"the report's {path} is a {type(value).__name__}; use numbers, strings, lists and dicts")


def _missing_keys(report: Mapping[str, Any]) -> Iterator[str]:
    for path, keys in _REQUIRED.items():
        part = report.get(path) if path else report
        if isinstance(part, Mapping):  # a part that is missing is named where its parent is checked
            yield from (f"{path}.{key}".lstrip(".") for key in keys if key not in part)
        elif part is not None:
            yield f"{path} as a dict"
    conditions, metrics = report.get("condition_list") or (), report.get("metric_list") or ()
    listed = (("condition_list", conditions, _CONDITION_KEYS), ("metric_list", metrics, _METRIC_KEYS))
    for path, items, keys in (*listed, ("answers", report.get("answers") or (), _ANSWER_KEYS)):
        for index, item in enumerate(items):
            yield from (f"{path}.{index}.{key}" for key in keys if key not in item)
    measured = report.get("conditions")
    for condition in [item.get("name") for item in conditions] if isinstance(measured, Mapping) else ():
        if condition not in measured:
            yield f"conditions.{condition}"
        else:
            names = [metric.get("name") for metric in metrics]
            yield from (f"conditions.{condition}.{name}" for name in names if name not in measured[condition])
        for index, item in enumerate(report.get("answers") or ()):
            if condition not in item.get("answers", {condition: ""}):
                yield f"answers.{index}.answers.{condition}"
