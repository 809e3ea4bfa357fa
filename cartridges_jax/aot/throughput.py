"""An upper bound on decoding speed, with a cartridge or with the whole text as the prefix.

Decoding is bound by memory: a step reads the weights once and the keys and values of every
conversation, and the memory that the weights leave limits the number of conversations. The paper's
peak throughput (arXiv 2506.06266, section 5: 26.4 times) rests on this.
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
      prefix: `LONG`, `OWN` or `SHARED`.
      chip, num_devices: weights and heads are split over all devices.
      num_rows: conversations at once.
      tokens_per_second: tokens of all conversations.
      bound_by: "compute" or "memory".
    """

    prefix: str
    chip: str
    num_devices: int
    num_rows: int
    tokens_per_second: float
    bound_by: str


LONG, OWN, SHARED = "a text for each", "a cartridge for each", "one cartridge for all"


def predict(workload: Workload, chip: Chip, num_devices: int) -> list[Throughput]:
    """The throughput of long contexts, of a cartridge for each conversation, and of one cartridge for all.

    An upper bound: collectives, activations and the overheads of kernels cost nothing here.
    """
    config, dtype = workload.config, DTYPES[workload.dtype]
    params = abstract_loaded(config, dtype, stored=workload.weights)
    weights = num_bytes(params)
    per_slot = kv_bytes_per_token(config, dtype)
    free = num_devices * chip.memory_bytes - weights

    def at_most(prefix: str, each: int, shared: int) -> Throughput:
        rows = max(int((free - per_slot * shared) // (per_slot * each)), 0)
        compute = decode_flops(config, rows, each + shared) / (num_devices * chip.flops)
        memory = decode_bytes(config, params, dtype, rows, shared, each) / (num_devices * chip.memory_bandwidth)
        return Throughput(
            prefix,
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
    """The smallest power of two of devices that holds the weights and one conversation with the long text."""
    params = abstract_loaded(workload.config, DTYPES[workload.dtype], stored=workload.weights)
    text = kv_bytes_per_token(workload.config, DTYPES[workload.dtype]) * (workload.visible_tokens + workload.own_slots)
    number = 1
    while number * chip.memory_bytes < num_bytes(params) + text:
        number *= 2
    return number


def throughput_table(workload: Workload) -> str:
    """A table for v5e and H100, each with the fewest devices that can decode with the long text."""
    rows = []
    for chip in (V5E, H100):
        found = predict(workload, chip, fewest_devices(workload, chip))
        for one in found:
            rows.append(
                (
                    f"{one.num_devices} x {one.chip}",
                    one.prefix,
                    f"{one.num_rows:,}",
                    f"{one.tokens_per_second:,.0f}",
                    f"{one.tokens_per_second / found[0].tokens_per_second:.1f}x",
                    one.bound_by,
                )
            )
    return table(
        ("devices", "prefix", "conversations at once", "tokens/s at most", "against the text", "bound by"), rows
    )
