"""Writes what a run measured: `report.json` (numbers), `report.html` (the same, to look at), and a terminal summary.

The report is a dict; `_REQUIRED` lists what it must hold. Losses are nats per token, sizes bytes, times seconds. A number
that is undefined is null, and `reasons` says why under its dotted path: {"conditions.none.f1": "no answers were made"}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from cartridges_jax.evaluation import figures
from cartridges_jax.evaluation.metrics import contains_answer

CONDITIONS = ("none", "truncated", "cartridge", "icl")  # from knowing least to knowing most
MEASURES = ("answer_nll", "teacher_kl", "heldout_kl", "own_nll", "f1", "exact_match", "prefix_tokens", "kv_bytes")
SHOWN_ANSWERS = 6  # the rest unfold on the page

_REQUIRED: dict[str, Sequence[str]] = {
    "": (
        "model model_fingerprint seed corpus cartridge conditions kl_closed kl_closed_truncated gap_closed "
        "dropped_training_questions seconds conversations heldout_conversations steps refused_steps questions "
        "questions_sha256 judge trained_by coverage history answers config"
    ).split(),
    "corpus": ("name", "tokens", "sha256"),
    "cartridge": ("tokens", "bytes", "frozen"),
    "conditions": CONDITIONS,
    **{f"conditions.{name}": MEASURES for name in CONDITIONS},
    "seconds": ("synthesis", "training", "evaluation", "total"),
    "coverage": ("sentences", "asked", "conversations_per_sentence", "tokens"),
    "history": ("train", "heldout"),
}
_ANSWER_KEYS = ("question", "references", *CONDITIONS)


def write_report(workdir: str | Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `workdir`, each whole or not at all.

    NaN and infinities become null with a reason; a null number of a condition that came without one gets one that says so.

    Returns:
      The paths of the JSON and the HTML file.

    Raises:
      ValueError: if the report lacks a key; the message lists every one that is missing.
      TypeError: if it holds something JSON cannot.
    """
    report = complete_report(report)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    json_path, html_path = workdir / "report.json", workdir / "report.html"
    _write_atomically(json_path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write_atomically(html_path, render_html(report))
    return json_path, html_path


def complete_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report as plain JSON values, checked, with a reason beside every number that is undefined."""
    reasons = dict(report.get("reasons") or {})
    plain = _plain({key: value for key, value in report.items() if key != "reasons"}, "", reasons)
    if missing := list(_missing_keys(plain)):
        raise ValueError(
            f"the report lacks {', '.join(missing)}; an undefined number is None with an entry in 'reasons'"
        )
    numbers = [f"conditions.{name}.{measure}" for name in CONDITIONS for measure in MEASURES]
    for path in (*numbers, "kl_closed", "kl_closed_truncated", "gap_closed", "coverage.tokens"):
        if _at(plain, path) is None:
            reasons.setdefault(path, "no reason was recorded")
    return {**plain, "reasons": reasons}


def render_html(report: Mapping[str, Any]) -> str:
    """The page of a complete report: self-contained, without scripts or requests."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": format_bytes, "seconds": format_seconds, "percent": format_percent}
    template = environment.from_string(
        resources.files("cartridges_jax.evaluation").joinpath("report.html.jinja").read_text("utf-8")
    )
    known = [(name, report["conditions"][name]["kv_bytes"]) for name in ("icl", "truncated", "cartridge")]
    labels = condition_labels(report)
    explained = _paths_by_reason(report)
    memory_bars = [(labels[name], size, figures.CONDITION_COLOURS[name]) for name, size in known if size is not None]
    return template.render(
        report=report,
        conditions=CONDITIONS,
        labels=labels,
        memory_ratio=_memory_ratio(report),
        config=json.dumps(report["config"], indent=2, ensure_ascii=False),
        shown_answers=SHOWN_ANSWERS,
        contains_answer=contains_answer,
        explained=explained,
        footnotes={path: number for number, paths in enumerate(explained.values(), 1) for path in paths},
        loss=_both_widths(figures.loss_figure, report["history"]["train"], report["history"]["heldout"]),
        bars=_both_widths(
            figures.conditions_figure,
            labels,
            [
                ("Distance to the whole document (KL), nats per token", _measure(report, "teacher_kl")),
                ("Loss on the reference answers, nats per token", _measure(report, "answer_nll")),
            ],
        ),
        memory=memory_bars and _both_widths(figures.memory_figure, memory_bars, format_bytes),
        coverage=_both_widths(figures.coverage_figure, report["coverage"]["conversations_per_sentence"]),
    )


def print_summary(report: Mapping[str, Any], html_path: str | Path | None = None, *, answers: int = 3) -> str:
    """Prints, and returns, the four conditions as a table, a few questions answered side by side, and where the page is."""
    summary = format_summary(report, html_path, answers=answers)
    print(summary)
    return summary


def format_summary(report: Mapping[str, Any], html_path: str | Path | None = None, *, answers: int = 3) -> str:
    """The text that `print_summary` prints, at most 100 columns wide."""
    report = complete_report(report)
    labels = condition_labels(report)
    header = ("", "KL to whole doc", "answer NLL", "F1", "slots", "KV memory")
    rows = [header]
    for name in CONDITIONS:
        values = report["conditions"][name]
        rows.append((
            labels[name], _number(values["teacher_kl"], ".3f"), _number(values["answer_nll"], ".3f"),
            _number(values["f1"], ".2f"), _number(values["prefix_tokens"], ",d"), format_bytes(values["kv_bytes"]),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    lines.insert(1, "─" * max(map(len, lines)))
    lines += ["", headline(report)]
    for item in report["answers"][:answers]:
        lines += ["", _clip(f"Q  {item['question']}")]
        lines += [_clip(f"   {'reference'.ljust(widths[0])}  {' / '.join(item['references'])}")]
        lines += [_clip(f"   {labels[name].ljust(widths[0])}  {item[name] or '—'}") for name in CONDITIONS]
    if html_path is not None:
        lines += ["", f"Report: {html_path}"]
    return "\n".join(lines)


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: how much of the gap the cartridge closes, and for how much less memory."""
    closed, ratio = report["kl_closed"], _memory_ratio(report)
    memory = "" if ratio is None else f", with {format_ratio(ratio)} KV memory"
    if closed is None:
        return f"What the cartridge closes of the gap is undefined: {report['reasons']['kl_closed']}."
    start = report["kl_closed_truncated"]
    beside = (
        ""
        if start is None
        else f" (the document's first {report['cartridge']['tokens']:,} tokens: {format_percent(start)})"
    )
    return f"The cartridge closes {format_percent(closed)} of the gap to the whole document{beside}{memory}."


def condition_labels(report: Mapping[str, Any]) -> dict[str, str]:
    """What readers call the conditions, in the order of `CONDITIONS`."""
    kept = report["conditions"]["truncated"]["prefix_tokens"]
    first = "Its first tokens" if kept is None else f"First {kept:,} tokens"
    return {"none": "No document", "truncated": first, "cartridge": "Cartridge", "icl": "Whole document"}


def format_bytes(size: float | None) -> str:
    """Binary units: 2048 -> "2.0 KiB"; None -> "—"."""
    if size is None:
        return "—"
    if size < 1024:
        return f"{size:.0f} B"
    exponent = min(int(math.log2(size) // 10), 4)
    return f"{size / 1024**exponent:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


def format_seconds(seconds: float | None) -> str:
    """Whole minutes and seconds from a minute on: 95.2 -> "1 min 35 s"; None -> "—"."""
    if seconds is None:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_percent(fraction: float | None) -> str:
    """0.704 -> "70 %", with a real minus sign; None -> "—"."""
    if fraction is None:
        return "—"
    return f"{round(100 * fraction)} %".replace("-", "−")


def format_ratio(ratio: float) -> str:
    """6.31 -> "6.3× less"; 0.5 -> "2.0× more"."""
    return f"{ratio:.1f}× less" if ratio >= 1 else f"{1 / ratio:.1f}× more"


def _both_widths(draw, *arguments) -> Markup:
    """A figure for wide pages and one for narrow; the page's CSS shows one of them."""
    wide, narrow = draw(*arguments, figures.WIDE), draw(*arguments, figures.NARROW)
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')


def _memory_ratio(report: Mapping[str, Any]) -> float | None:
    whole, small = report["conditions"]["icl"]["kv_bytes"], report["cartridge"]["bytes"]
    return whole / small if whole and small else None


def _measure(report: Mapping[str, Any], measure: str) -> dict[str, float | None]:
    return {name: report["conditions"][name][measure] for name in CONDITIONS}


def _paths_by_reason(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """The page's footnotes: each distinct reason, in order of appearance, with the dotted paths it explains."""
    explained: dict[str, list[str]] = {}
    for path, reason in report["reasons"].items():
        explained.setdefault(reason, []).append(path)
    return explained


def _plain(value: Any, path: str, reasons: dict[str, str]) -> Any:
    """Turns NumPy scalars, arrays, paths and tuples into JSON values, and what is not finite into null with a reason."""
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
        part = _at(report, path)
        if isinstance(part, Mapping):  # a part that is missing is named where its parent is checked
            yield from (f"{path}.{key}".lstrip(".") for key in keys if key not in part)
        elif part is not None:
            yield f"{path} as a dict"
    for index, item in enumerate(report.get("answers") or ()):
        yield from (f"answers.{index}.{key}" for key in _ANSWER_KEYS if key not in item)


def _at(report: Any, path: str) -> Any:
    for key in path.split(".") if path else ():
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def _number(value: float | None, spec: str) -> str:
    return "—" if value is None else format(int(value) if spec.endswith("d") else value, spec)


def _clip(line: str, columns: int = 100) -> str:
    line = " ".join(line.splitlines())
    return line if len(line) <= columns else line[: columns - 1] + "…"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
