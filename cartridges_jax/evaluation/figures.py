"""The report's figures, drawn by matplotlib as inline SVG that follows the page's colours and font.

Colours are written as stand-ins and exchanged for CSS variables afterwards, so that one picture serves light and dark
pages; text stays text. Every figure comes in two widths, since a scaled-down picture cannot be read on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDE, NARROW = 8.8, 4.1  # inches; the page shows either at about 1.3 CSS pixels a point
LABELS = 1.25  # inches to the left of bars, for their names

# Stand-in colour -> (CSS variable, fallback outside the page). Stand-ins only need to be distinct.
INK, MUTED, GRID, TRACK = "#101010", "#202020", "#303030", "#404040"
CARTRIDGE, DOCUMENT, PLAIN, WARNING, FAINT = "#505050", "#606060", "#707070", "#808080", "#909090"
_CSS = {
    INK: "var(--ink, #1c1f26)",
    MUTED: "var(--muted, #5d6573)",
    GRID: "var(--grid, #e3e6eb)",
    TRACK: "var(--track, #eef0f4)",
    CARTRIDGE: "var(--cartridge, #0f766e)",
    DOCUMENT: "var(--document, #b45309)",
    PLAIN: "var(--plain, #9aa3b2)",
    WARNING: "var(--warning, #be3455)",
    FAINT: "var(--faint, #9fd3cc)",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlepad": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
CONDITION_COLOURS = {"none": PLAIN, "truncated": PLAIN, "cartridge": CARTRIDGE, "icl": DOCUMENT}


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

    return _svg("loss", (width, 2.7), draw)


def conditions_figure(
    labels: dict[str, str], panels: Sequence[tuple[str, dict[str, float | None]]], width: float
) -> str:
    """Horizontal bars of the conditions, one panel a measure.

    Args:
      labels: condition -> what to call it, from top to bottom.
      panels: (title, condition -> value); None is drawn as "undefined".
      width: inches; panels stand side by side where there is room.

    Returns:
      An SVG string.
    """
    beside = width > 6
    height = 1.75 if beside else 1.65 * len(panels)

    def draw(figure: Figure) -> None:
        for index, (title, values) in enumerate(panels):
            column, row = (index, 0) if beside else (0, index)
            columns, rows = (len(panels), 1) if beside else (1, len(panels))
            cell_width, cell_height = width / columns, height / rows
            left, bottom, wide, high = _margins(cell_width, cell_height, left=LABELS, right=0.7, top=0.36, bottom=0.08)
            axes = figure.add_axes(
                ((column + left) / columns, (rows - 1 - row + bottom) / rows, wide / columns, high / rows)
            )
            axes.set_title(title, x=-LABELS / (cell_width - LABELS - 0.7))
            bars = [(label, values[name], CONDITION_COLOURS[name]) for name, label in labels.items()]
            _draw_bars(axes, bars, lambda value: f"{value:.2f}", missing="undefined")

    return _svg("conditions", (width, height), draw)


def memory_figure(bars: Sequence[tuple[str, int, str]], format_bytes: Callable[[float], str], width: float) -> str:
    """Horizontal bars of KV bytes `(label, bytes, colour)` on a linear scale: the difference is the message."""
    height = 0.12 + 0.34 * len(bars)

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(_margins(width, height, left=LABELS, right=0.85, top=0.04, bottom=0.04))
        _draw_bars(axes, bars, format_bytes, missing="unknown")

    return _svg("memory", (width, height), draw)


def coverage_figure(conversations: Sequence[int], width: float) -> str:
    """Conversations per sentence along the document, `[sentences]`; sentences nobody asked about are marked below."""

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

    return _svg("coverage", (width, 1.9), draw)


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, float | None, str]], text: Callable, *, missing: str) -> None:
    rows = range(len(bars))
    highest = max([value for _, value, _ in bars if value is not None] + [0.0]) or 1.0
    lowest = min([value for _, value, _ in bars if value is not None] + [0.0])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(lowest, highest)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks(list(rows), [label for label, _, _ in bars])
    axes.tick_params(axis="y", pad=LABELS * 72, colors=INK)  # labels start at the figure's left edge
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("left")
    axes.barh(rows, highest - lowest, left=lowest, height=0.56, color=TRACK)
    for row, (_, value, colour) in enumerate(bars):
        axes.barh(row, value or 0.0, height=0.56, color=colour)
        written = missing if value is None else text(value)
        axes.annotate(written, (1, row), xycoords=("axes fraction", "data"), xytext=(5, 0),
                      textcoords="offset points", va="center_baseline", color=MUTED if value is None else INK,
                      fontsize=8 if value is None else 9)  # fmt: skip


def _label_line_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names each line beside its last point, moving names apart where lines end close together."""
    low, high = axes.get_ylim()
    apart = 0.09 * (high - low)
    right = max([x for x, *_ in ends], default=0)
    placed: list[float] = []
    for _, y, name, colour in sorted(ends, key=lambda end: end[1]):
        at = max([y, *(other + apart for other in placed)])
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


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    # The salt makes ids deterministic; the width in it keeps those of two versions on one page apart.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{name}-{size[0]}"}):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Cuts a stand-alone SVG down to what a page needs, with the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"(font: [\d.]+px) [^;\"]+", r"\1 var(--font, sans-serif)", svg)
    for stand_in, variable in _CSS.items():
        svg = svg.replace(stand_in, variable)
    return svg
