"""Inline SVG that follows a page's colours and font.

Colours are written as stand-ins and exchanged for CSS variables afterwards, so that one picture serves light and dark
pages; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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


def draw_svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """A figure as an SVG string for a page.

    Args:
      name: unique among the page's figures.
      size: width and height in inches.
      draw: fills the figure.
    """
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
