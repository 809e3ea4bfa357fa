"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def format_value(metric: Mapping[str, Any], value: float | None) -> str:
    """A metric's value by its `format`: a format specification, "count", "bytes" or "percent"; None -> "—"."""
    if value is None:
        return "—"
    written = {"count": lambda x: f"{round(x):,}", "bytes": format_bytes, "percent": format_percent}
    known = written.get(metric["format"])
    return known(value) if known else format(value, metric["format"])


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
