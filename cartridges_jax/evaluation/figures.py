"""The report's figures.

Every figure comes in two widths, since a scaled-down picture cannot be read on a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cartridges_jax.evaluation.svg import CARTRIDGE, DOCUMENT, FAINT, INK, MUTED, PLAIN, TRACK, WARNING, draw_svg
from cartridges_jax.evaluation.units import format_bytes, format_value

WIDE, NARROW = 8.8, 4.1  # inches; the page shows either at about 1.3 CSS pixels a point

_COLOURS = {"subject": CARTRIDGE, "judge": DOCUMENT}  # by a condition's role; the others are plain
_LONGEST_LABEL = 24  # characters


def loss_figure(train: Sequence[dict], heldout: Sequence[dict], width: float) -> str:
    """Training and held-out loss (nats per token) over steps, each `[{"step", "loss"}, ...]`, as an SVG string."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(_margins(width, 2.7, left=0.5, right=0.85, top=0.38, bottom=0.5))
        axes.grid(axis="x", visible=False)
        axes.set_title("Loss, nats per token", x=-0.5 / (width - 1.35))
        axes.set_xlabel("step", loc="right", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        ends = []
        if train:
            steps, losses = _series(train)
            noisy = len(losses) > 12
            axes.plot(steps, losses, color=FAINT if noisy else CARTRIDGE, linewidth=1 if noisy else 2)
            if noisy:
                losses = _moving_average(losses, max(3, len(losses) // 12))
                axes.plot(steps, losses, color=CARTRIDGE, linewidth=2)
            ends.append((steps[-1], losses[-1], "training", CARTRIDGE))
        if heldout:
            steps, losses = _series(heldout)
            axes.plot(steps, losses, color=DOCUMENT, linewidth=2, marker="o", markersize=4)
            ends.append((steps[-1], losses[-1], "held out", DOCUMENT))
        axes.margins(x=0.01)
        _label_line_ends(axes, ends)

    return draw_svg("loss", (width, 2.7), draw)


def conditions_figure(
    conditions: Sequence[Mapping[str, str]],
    panels: Sequence[tuple[Mapping[str, Any], Sequence[float | None]]],
    width: float,
) -> str:
    """Horizontal bars of the conditions, one panel per metric.

    Args:
      conditions: {"title", "role"}, from top to bottom.
      panels: metrics {"title", "unit", "format", "higher_is_better"}, each with the conditions' values; None is drawn as
        "undefined".
      width: inches; two panels are placed side by side where there is room.

    Returns:
      An SVG string.
    """
    columns = min(len(panels), 2) if width > 6 else 1
    rows = -(-len(panels) // columns)
    cell_width, cell_height = width / columns, 0.42 + 0.34 * len(conditions)
    labels = _label_inches(conditions)

    def draw(figure: Figure) -> None:
        for index, (metric, values) in enumerate(panels):
            row, column = divmod(index, columns)
            left, bottom, wide, high = _margins(cell_width, cell_height, left=labels, right=0.7, top=0.36, bottom=0.06)
            axes = figure.add_axes(
                ((column + left) / columns, (rows - 1 - row + bottom) / rows, wide / columns, high / rows)
            )
            title = ", ".join(filter(None, (metric["title"], metric["unit"])))
            arrow = "↑" if metric["higher_is_better"] else "↓"
            axes.set_title(f"{title} {arrow}", x=-labels / (cell_width - labels - 0.7))
            written = [None if value is None else format_value(metric, value) for value in values]
            _draw_bars(axes, conditions, values, written, labels, missing="undefined")

    return draw_svg("conditions", (width, rows * cell_height), draw)


def memory_figure(sizes: Sequence[tuple[Mapping[str, str], int]], width: float) -> str:
    """Horizontal bars of KV bytes, each (condition, bytes), on a linear scale: the difference is the message."""
    height = 0.12 + 0.34 * len(sizes)
    conditions, values = [condition for condition, _ in sizes], [size for _, size in sizes]
    labels = _label_inches(conditions)

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(_margins(width, height, left=labels, right=0.85, top=0.04, bottom=0.04))
        _draw_bars(axes, conditions, values, [format_bytes(size) for size in values], labels, missing="unknown")

    return draw_svg("memory", (width, height), draw)


def coverage_figure(conversations: Sequence[int], width: float) -> str:
    """Conversations per sentence along the document, `[sentences]`; sentences without any are marked below."""

    def draw(figure: Figure) -> None:
        count = len(conversations)
        axes = figure.add_axes(_margins(width, 1.9, left=0.5, right=0.2, top=0.38, bottom=0.36))
        axes.grid(axis="x", visible=False)
        axes.set_title("Conversations per sentence", x=-0.5 / (width - 0.7))
        axes.stairs(conversations, fill=True, color=FAINT)
        axes.stairs(conversations, color=CARTRIDGE, linewidth=0.8 if count < 150 else 0.4)
        highest = max([*conversations, 1])
        if silent := [index + 0.5 for index, asked in enumerate(conversations) if not asked]:
            below = [-0.06 * highest] * len(silent)
            axes.plot(silent, below, "|", color=WARNING, markersize=6, markeredgewidth=1.4, clip_on=False)
        axes.set_xlim(0, max(count, 1))
        axes.set_ylim(0, highest * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xticks([0, count])
        axes.set_xticklabels(["start of the document", "end"])
        for label, align in zip(axes.get_xticklabels(), ("left", "right")):
            label.set_horizontalalignment(align)
        axes.tick_params(axis="x", pad=11)

    return draw_svg("coverage", (width, 1.9), draw)


def _label_inches(conditions: Sequence[Mapping[str, str]]) -> float:
    """Inches to the left of bars, for their names."""
    longest = max(min(len(condition["title"]), _LONGEST_LABEL) for condition in conditions)
    return max(1.25, 0.1 + 0.072 * longest)


def _draw_bars(
    axes: Axes,
    conditions: Sequence[Mapping[str, str]],
    values: Sequence[float | None],
    written: Sequence[str | None],
    labels: float,
    *,
    missing: str,
) -> None:
    rows = range(len(values))
    highest = max([value for value in values if value is not None] + [0.0]) or 1.0
    lowest = min([value for value in values if value is not None] + [0.0])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(lowest, highest)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks(list(rows), [_clipped(condition["title"]) for condition in conditions])
    axes.tick_params(axis="y", pad=labels * 72, colors=INK)  # labels start at the figure's left edge
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("left")
    axes.barh(rows, highest - lowest, left=lowest, height=0.56, color=TRACK)
    for row, (condition, value, text) in enumerate(zip(conditions, values, written)):
        axes.barh(row, value or 0.0, height=0.56, color=_COLOURS.get(condition["role"], PLAIN))
        axes.annotate(missing if text is None else text, (1, row), xycoords=("axes fraction", "data"), xytext=(5, 0),
                      textcoords="offset points", va="center_baseline", color=MUTED if value is None else INK,
                      fontsize=8 if value is None else 9)  # fmt: skip


def _clipped(title: str) -> str:
    return title if len(title) <= _LONGEST_LABEL else title[: _LONGEST_LABEL - 1] + "…"


def _label_line_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names each line beside its last point, with a gap between names whose lines end close together."""
    low, high = axes.get_ylim()
    gap = 0.09 * (high - low)
    right = max([x for x, *_ in ends], default=0)
    placed: list[float] = []
    for _, y, name, colour in sorted(ends, key=lambda end: end[1]):
        at = max([y, *(other + gap for other in placed)])
        placed.append(at)
        axes.annotate(name, (right, at), xytext=(7, 0), textcoords="offset points", va="center", color=colour,
                      annotation_clip=False)  # fmt: skip


def _series(points: Sequence[dict]) -> tuple[list[float], list[float]]:
    kept = [point for point in points if point["loss"] is not None]
    return [point["step"] for point in kept] or [0], [point["loss"] for point in kept] or [float("nan")]


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred mean; the window narrows at the ends, so that no value is lost or shifted."""
    averages = []
    for index in range(len(values)):
        reach = min(window // 2, index, len(values) - 1 - index)
        near = values[index - reach : index + reach + 1]
        averages.append(sum(near) / len(near))
    return averages


def _margins(width: float, height: float, *, left: float, right: float, top: float, bottom: float):
    """Margins in inches -> matplotlib's (left, bottom, width, height) as fractions of the figure."""
    return left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height
