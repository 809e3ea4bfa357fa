"""Figures of the benchmarks, one PNG each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cartridges_jax.benchmarks.inputs import OURS
from cartridges_jax.benchmarks.results import Result

_INK, _MUTED, _GRID = "#1c1f26", "#5d6573", "#e3e6eb"
_COLOURS = ("#0f766e", "#b45309")
# A side has the same colour in every figure: the first entry that is part of its name.
_BY_NAME = (
    ("cartridges_jax bfloat16", "#2fa597"), ("cartridges_jax int8", "#9ed8d1"), ("cartridges_jax", "#0f766e"),
    ("llama.cpp", "#9aa3b2"),
    ("vllm bfloat16", "#aab6da"), ("vllm", "#6d7fb3"), ("bfloat16", "#e5b67f"), ("", "#b45309"),
)  # fmt: skip
_STYLE = {
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
}


def _drawn(path: Path, size: tuple[float, float], panels: int, draw) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(path, dpi=130)


def grouped_bars(axes: Axes, groups: Sequence[str], series: dict[str, Sequence[float | None]], unit: str) -> None:
    """Draws bars side by side, each with its number; None leaves a gap."""
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        at = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(at, [value or 0.0 for value in values], width * 0.92, label=name, color=_colour(name))
        labels = ["" if value is None else f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in values]
        axes.bar_label(drawn, labels, fontsize=7, padding=2, color=_INK)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.15)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)


def _colour(name: str) -> str:
    return next(colour for part, colour in _BY_NAME if part in name)


def _series(rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    variants = list(dict.fromkeys(name for row in rows for name in row.get("variants", {})))
    return {
        OURS: [row["value"] for row in rows],
        **{name: [row["variants"][name]["value"] for row in rows] for name in variants},
        **{name: [row["peers"].get(name) for row in rows] for name in names},
    }


def train_step(result: Result, path: Path) -> None:
    """Speed per P beside the lengths of the conversations."""

    def draw(axes):
        groups = [f"P = {row['slots']}\nours: {row['fraction_of_limit']:.0%} of the ceiling" for row in result.rows]
        grouped_bars(axes[0], groups, _series(result.rows), result.unit)
        axes[0].set_title("Distillation step, target tokens/s")
        histogram = result.more["length_histogram"]
        axes[1].bar(list(histogram), list(histogram.values()), width=1.0, color=_COLOURS[0])
        axes[1].set_title("Lengths of the conversations, tokens")
        axes[1].set_ylabel("conversations")

    _drawn(path, (9.5, 4.2), 2, draw)


def decode(result: Result, path: Path) -> None:
    """Speed per batch size beside the time to the first token."""

    def draw(axes):
        grouped_bars(axes[0], [f"batch {row['batch']}" for row in result.rows], _series(result.rows), result.unit)
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter("")
        axes[0].set_title("Greedy decode, tokens/s over the batch")
        first = result.more["first_token_seconds"]
        grouped_bars(
            axes[1], ["after a cartridge", "after reading the document"],
            {name: [pair["cartridge"], pair["document"]] for name, pair in first.items()}, "seconds",
        )  # fmt: skip
        axes[1].set_title("Time to the first token")

    _drawn(path, (11, 4.4), 2, draw)


def cache_sweep(result: Result, path: Path) -> None:
    """Speed over cache size, own and shared, with the machine's limits."""

    def draw(axes):
        for number, kind in enumerate(("shared", "own")):
            rows = sorted((row for row in result.rows if row["kind"] == kind), key=lambda row: row["slots"])
            sizes = [row["slots"] for row in rows]
            colour = _COLOURS[number]
            axes[0].plot(sizes, [row["value"] for row in rows], "o-", color=colour, label=f"{kind} slots")
            axes[0].plot(sizes, [row["limit"] for row in rows], "--", color=colour, alpha=0.5, label=f"{kind}, limit")
            for row in rows:
                axes[0].annotate(
                    f"{row['value']:.0f}\n({row['batch']})", (row["slots"], row["value"]), fontsize=7,
                    textcoords="offset points", xytext=(0, 6), ha="center",
                )  # fmt: skip
        axes[0].set_xscale("log", base=2)
        axes[0].set_yscale("log")
        for axis in (axes[0].xaxis, axes[0].yaxis):
            axis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter("")
        axes[0].set_xlabel("cache size, slots (in brackets: the best batch)")
        axes[0].set_ylabel(result.unit)
        axes[0].set_title(f"Decode within {result.more['budget_gib']:g} GiB of KV")
        axes[0].legend()

    _drawn(path, (7, 4.6), 1, draw)


def self_study(result: Result, path: Path) -> None:
    """Conversations per second."""

    def draw(axes):
        grouped_bars(
            axes[0], [f"a chunk of {result.rows[0]['chunk_tokens']} tokens"], _series(result.rows), result.unit
        )
        axes[0].set_title("Self-study")

    _drawn(path, (6, 4.2), 1, draw)
