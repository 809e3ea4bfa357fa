"""How fast conversations could be answered: a cartridge in front of them, or the whole text.

Decoding is bound by memory: a step reads the weights once and every conversation's keys and
values, and the memory that the weights leave says how many conversations there can be. That
is what the paper's peak throughput (arXiv 2506.06266, section 5: 26.4 times) rests on.
"""

from __future__ import annotations

import dataclasses

from cartridges_jax.aot.hardware import H100, V5E, Chip
from cartridges_jax.aot.tables import table
from cartridges_jax.aot.workload import Workload
from cartridges_jax.models.costs import decode_bytes, decode_flops, kv_bytes_per_token
from cartridges_jax.models.model import DTYPES
from cartridges_jax.models.weights import abstract_loaded
from cartridges_jax.quantized import num_bytes


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Decoding at the largest batch that memory holds.

    Attributes:
      front: what stands in front of the conversations.
      chip, num_devices: weights and heads are split over all of them.
      num_rows: conversations at once.
      tokens_per_second: of all of them.
      bound_by: "compute" or "memory".
    """

    front: str
    chip: str
    num_devices: int
    num_rows: int
    tokens_per_second: float
    bound_by: str


LONG, OWN, SHARED = "the text, each its own", "a cartridge, each its own", "one cartridge for all"


def predict(workload: Workload, chip: Chip, num_devices: int) -> list[Throughput]:
    """Long contexts, cartridges of several texts, and one cartridge that all conversations share.

    An upper bound: what devices send each other, activations and kernels' overheads cost nothing here.
    """
    config, dtype = workload.config, DTYPES[workload.dtype]
    params = abstract_loaded(config, dtype, stored=workload.weights)
    weights = num_bytes(params)
    per_slot = kv_bytes_per_token(config, dtype)
    free = num_devices * chip.memory_bytes - weights

    def at_most(front: str, each: int, shared: int) -> Throughput:
        rows = max(int((free - per_slot * shared) // (per_slot * each)), 0)
        compute = decode_flops(config, rows, each + shared) / (num_devices * chip.flops)
        memory = decode_bytes(config, params, dtype, rows, shared, each) / (num_devices * chip.memory_bandwidth)
        return Throughput(
            front,
            chip.name,
            num_devices,
            rows,
            rows / max(compute, memory),
            "compute" if compute > memory else "memory",
        )

    own = workload.own_slots
    return [
        at_most(LONG, workload.visible_tokens + own, 0),
        at_most(OWN, workload.num_slots + own, 0),
        at_most(SHARED, own, workload.num_slots),
    ]


def fewest_devices(workload: Workload, chip: Chip) -> int:
    """A power of two that holds the weights and one conversation with the long text."""
    params = abstract_loaded(workload.config, DTYPES[workload.dtype], stored=workload.weights)
    text = kv_bytes_per_token(workload.config, DTYPES[workload.dtype]) * (workload.visible_tokens + workload.own_slots)
    number = 1
    while number * chip.memory_bytes < num_bytes(params) + text:
        number *= 2
    return number


def throughput_table(workload: Workload) -> str:
    """v5e and H100, each with the fewest devices that can decode behind the text at all."""
    rows = []
    for chip in (V5E, H100):
        found = predict(workload, chip, fewest_devices(workload, chip))
        for one in found:
            rows.append(
                (
                    f"{one.num_devices} x {one.chip}",
                    one.front,
                    f"{one.num_rows:,}",
                    f"{one.tokens_per_second:,.0f}",
                    f"{one.tokens_per_second / found[0].tokens_per_second:.1f}x",
                    one.bound_by,
                )
            )
    return table(
        ("devices", "in front", "conversations at once", "tokens/s at most", "against the text", "bound by"), rows
    )
