"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from cartridges_jax.aot.check import Check

_HEAD = (
    "program", "mesh", "devices", "micro-batches", "GiB a device", "fits", "sent a device", "compute", "memory", "network",
    "bound by",
)  # fmt: skip


def checks_table(checks: Sequence[Check]) -> str:
    """A table with a row for each check; times are in seconds."""
    return table(
        _HEAD,
        [
            (
                one.program,
                one.mesh,
                str(one.num_devices),
                str(one.micro_batches) if one.program == "train" else "",
                f"{one.bytes_per_device / 2**30:.2f}",
                "yes" if one.fits else "no",
                "" if one.sent is None else f"{one.collective_bytes / 2**30:.3f} GiB",
                f"{one.roofline.compute:.4g}",
                f"{one.roofline.memory:.4g}",
                "" if one.sent is None else f"{one.roofline.network:.4g}",
                one.roofline.bound_by,
            )
            for one in checks
        ],
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in (head, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
