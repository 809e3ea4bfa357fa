"""The page of a report: self-contained HTML, without scripts or requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from cartridges_jax.evaluation import figures
from cartridges_jax.evaluation.report import memory_ratio, of_role
from cartridges_jax.evaluation.units import format_bytes, format_percent, format_seconds, format_value

SHOWN_ANSWERS = 6  # the rest unfold on the page


def render_html(report: Mapping[str, Any]) -> str:
    """The page of a complete report (see `complete_report`)."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": format_bytes, "seconds": format_seconds, "percent": format_percent}
    template = environment.from_string(
        resources.files("cartridges_jax.evaluation").joinpath("report.html.jinja").read_text("utf-8")
    )
    conditions, metrics = report["condition_list"], report["metric_list"]
    featured = [metric for metric in metrics if metric["featured"]]
    panels = [(metric, [report["conditions"][c["name"]][metric["name"]] for c in conditions]) for metric in featured]
    panels = [(metric, values) for metric, values in panels if any(value is not None for value in values)]
    sizes = [(c, report["conditions"][c["name"]].get("kv_bytes")) for c in conditions if c["role"] != "baseline"]
    sizes = [(condition, size) for condition, size in sizes if size is not None]
    explained = _paths_by_reason(report)
    return template.render(
        report=report,
        conditions=conditions,
        metrics=metrics,
        judge=of_role(report, "judge"),
        subject=of_role(report, "subject"),
        memory_ratio=memory_ratio(report),
        config=json.dumps(report["config"], indent=2, ensure_ascii=False),
        shown_answers=SHOWN_ANSWERS,
        explained=explained,
        footnotes={path: number for number, paths in enumerate(explained.values(), 1) for path in paths},
        format_value=format_value,
        drop_reasons=list(dict.fromkeys(r for counts in report["study"]["dropped"].values() for r in counts)),
        loss=_both_widths(figures.loss_figure, report["history"]["train"], report["history"]["heldout"]),
        bars=panels and _both_widths(figures.conditions_figure, conditions, panels),
        memory=sizes and _both_widths(figures.memory_figure, sizes),
        coverage=_both_widths(figures.coverage_figure, report["coverage"]["conversations_per_sentence"]),
    )


def _both_widths(draw, *arguments) -> Markup:
    """A figure for wide pages and one for narrow; the page's CSS shows one of them."""
    wide, narrow = draw(*arguments, figures.WIDE), draw(*arguments, figures.NARROW)
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')


def _paths_by_reason(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """The page's footnotes: each distinct reason, in order of appearance, with the dotted paths it explains."""
    explained: dict[str, list[str]] = {}
    for path, reason in report["reasons"].items():
        explained.setdefault(reason, []).append(path)
    return explained
