"""Published figures of the accelerators.

Bandwidths count one direction: the bytes that a chip can send while it receives as many.
"""

from __future__ import annotations

import dataclasses

GB, GiB, TB = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: the part of a topology's name before the colon.
      platform: JAX's name of its kind.
      flops: bfloat16 operations a second with float32 sums, dense.
      memory_bytes: memory that a program may use.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second that it sends in a ring of neighbours.
      ring: number of chips along an axis at which it wraps around (any multiple of it too); a shorter axis is a line.
      dimensions: dimensions of the grid of devices that these links form.
      max_devices: size of the largest group that they connect.
      node_devices: devices that share a host's network cards; 0 if the links leave the host.
      network_bandwidth: bytes a second and device between such hosts.
      source: URL of the figures.
    """

    name: str
    platform: str
    flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    ring: int
    dimensions: int
    max_devices: int
    node_devices: int
    network_bandwidth: float
    source: str


# A TPU's ring runs along one axis of the torus: two of its links, out of one and into the other,
# and the reverse at the same time. Google states the sum over all links, in and out.
V5E = Chip(
    name="v5e",
    platform="tpu",
    flops=197 * TB,
    memory_bytes=15.75 * GiB,  # of 16, as the compiler counts
    memory_bandwidth=819 * GB,
    link_bandwidth=400 * GB / 2 / 4 * 2,
    ring=16,
    dimensions=2,
    max_devices=256,
    node_devices=0,
    network_bandwidth=0,
    source="https://docs.cloud.google.com/tpu/docs/v5e",
)
V5P = Chip(
    name="v5p",
    platform="tpu",
    flops=459 * TB,
    memory_bytes=95 * GiB,
    memory_bandwidth=2765 * GB,
    link_bandwidth=1200 * GB / 2 / 6 * 2,
    ring=4,
    dimensions=3,
    max_devices=6144,
    node_devices=0,
    network_bandwidth=0,
    source="https://docs.cloud.google.com/tpu/docs/v5p",
)
V6E = Chip(
    name="v6e",
    platform="tpu",
    flops=918 * TB,
    memory_bytes=31.25 * GiB,  # of 32, as the compiler counts
    memory_bandwidth=1600 * GB,
    link_bandwidth=800 * GB / 2 / 4 * 2,
    ring=16,
    dimensions=2,
    max_devices=256,
    node_devices=0,
    network_bandwidth=0,
    source="https://docs.cloud.google.com/tpu/docs/v6e",
)
# SXM5, eight to a node behind NVLink switches; a 400 Gb/s network card for each, as in a DGX H100.
H100 = Chip(
    name="h100",
    platform="cuda",
    flops=989.4 * TB,
    memory_bytes=0.92 * 84_929_347_584,  # launch/slurm.sbatch gives JAX this share of the bytes that the driver reports
    memory_bandwidth=3350 * GB,
    link_bandwidth=900 * GB / 2,
    ring=1,
    dimensions=1,
    max_devices=2**14,
    node_devices=8,
    network_bandwidth=400 * GB / 8,
    source="https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
)
CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, H100)}
