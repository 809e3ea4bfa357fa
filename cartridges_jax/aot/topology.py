"""Descriptions of absent devices, from a name such as "v5e:4x4" or "h100:16"."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from cartridges_jax.aot.hardware import CHIPS, H100, Chip
from cartridges_jax.errors import UserError, one_line

# The properties of a GPU that XLA's compiler reads from a driver, for an H100 SXM5 of 80 GB.
_H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: the name that was asked for.
      chip: the kind of all devices.
      shape: the sizes in the name.
      devices: the devices.
      stand_in: true for this machine's CPU devices, used if the compiler for the real ones is not installed.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[jax.Device]
    stand_in: bool = False


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The kind of chip of a topology, and its sizes.

    Raises:
      UserError: no such topology.
    """
    kind, _, sizes = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise UserError(f"topology {name!r}: write v5e:4x4, v6e:4x4, v5p:2x2x4 or h100:8")
    shape = tuple(int(size) for size in sizes.split("x"))
    if len(shape) != chip.dimensions or min(shape) < 1:
        raise UserError(
            f"topology {name!r}: a {kind} has {chip.dimensions} dimension{'s' * (chip.dimensions > 1)} of 1 or more"
        )
    if math.prod(shape) > chip.max_devices:
        raise UserError(f"topology {name!r}: the links of {kind} connect {chip.max_devices} at most")
    if kind == "h100" and shape[0] > 8 and shape[0] % 8:
        raise UserError(f"topology {name!r}: above 8, H100s come in nodes of 8")
    return chip, shape


def find(name: str) -> Topology:
    """The devices of a topology.

    Without the compiler for GPUs, CPU devices are used instead: partitioning and collectives are those of a mesh of
    that size, the memory is not.

    Raises:
      UserError: no such topology, one that the compiler does not know, a TPU without the TPU compiler, or too few CPU
        devices to use instead of GPUs.
    """
    chip, shape = parse_topology(name)
    if chip.platform == "tpu":
        return Topology(name, chip, shape, _tpu_devices(name, shape))
    if importlib.util.find_spec("jax_cuda12_plugin") or importlib.util.find_spec("jax_cuda13_plugin"):
        return Topology(name, chip, shape, _cuda_devices(shape[0]))
    devices = jax.devices("cpu")
    if len(devices) < shape[0]:
        raise UserError(
            f"topology {name!r}: the compiler for GPUs is not installed (pip install -e '.[cuda]'), and there are "
            f"only {len(devices)} CPU devices to use instead: set JAX_NUM_CPU_DEVICES={shape[0]}"
        )
    return Topology(name, chip, shape, devices[: shape[0]], stand_in=True)


def of_size(chip: Chip, number: int) -> Topology:
    """The first `number` devices of the smallest topology that has them: a slice that one can rent, close to a cube.

    Raises:
      UserError: more devices than the chip's links connect, or as `find`.
    """
    if number > chip.max_devices:
        raise UserError(f"the links of {chip.name} connect {chip.max_devices} devices")
    if chip.platform == "tpu":
        # A host has four chips.
        sizes = [2, 2, 1][: chip.dimensions]
        while math.prod(sizes) < number:
            # The longest axis last.
            sizes[max(axis for axis in range(chip.dimensions) if sizes[axis] == min(sizes))] *= 2
        name = f"{chip.name}:{'x'.join(map(str, sorted(sizes) if math.prod(sizes) > 4 else sizes))}"
    else:
        name = f"{chip.name}:{number}"
    whole = find(name)
    return dataclasses.replace(whole, devices=whole.devices[:number])


def as_own_slice(part: Mesh, topology: Topology) -> Mesh:
    """The mesh of a rectangular part of a TPU slice, as a slice of its own.

    The TPU compiler numbers the devices of a program from 0 and refuses a part whose numbers start elsewhere.
    """
    if topology.chip.platform != "tpu" or part.devices.size == len(topology.devices):
        return part
    places = np.array([device.coords[: topology.chip.dimensions] for device in part.devices.flat])
    first = places.min(axis=0)
    shape = tuple(int(size) for size in places.max(axis=0) - first + 1)
    if math.prod(shape) != part.devices.size:
        return part
    alone = find(f"{topology.chip.name}:{'x'.join(map(str, shape))}").devices
    by_place = {tuple(device.coords[: len(shape)]): device for device in alone}
    devices = np.array([by_place[tuple(place)] for place in (places - first).tolist()]).reshape(part.devices.shape)
    return Mesh(devices, part.axis_names, axis_types=part.axis_types)


def _tpu_devices(name: str, shape: tuple[int, ...]) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology {name!r} needs the TPU compiler, which needs no TPU: pip install -e '.[tpu]'")
    # Several processes may load the compiler, and no metadata server is asked for the TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    options = {}
    if math.prod(shape) < 4:
        # Fewer chips than a host has.
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {name!r} is unknown to the TPU compiler: {one_line(error)}") from None


def _cuda_devices(number: int) -> Sequence[jax.Device]:
    nodes, per_node = (number // 8, 8) if number > 8 else (1, number)
    return topologies.get_topology_desc(
        H100.name, platform="cuda", topology=f"1x{nodes}x{per_node}", target_config=_H100_TARGET
    ).devices
