"""An estimate of the time that collectives take on the links of a topology.

The estimate is a lower bound rather than a mean. A TPU group that fills a box of its slice uses all links inside the box,
at the speed of its worst connected member: along an axis that wraps around a member has two links, at the end of a line
one. So a row of a v5e 4x4 has one link, the whole slice or a block of 2x2 has two, a row of 16 two (it wraps around), and
all of a 16x16 four. A group that is not a box has one. Groups of one collective that have strides share links; the
estimate ignores this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from cartridges_jax.aot.hardware import Chip
from cartridges_jax.aot.hlo import Collective
from cartridges_jax.aot.topology import Topology


@dataclasses.dataclass(frozen=True)
class Links:
    """The places of a program's devices in a slice.

    Attributes:
      chip: the kind of all devices.
      shape: shape of the slice, or the number of GPUs.
      places: coordinates in it, by a device's number in the program.
    """

    chip: Chip
    shape: tuple[int, ...]
    places: Sequence[tuple[int, ...]]

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For every axis of the slice, true if it closes to a ring."""
        whole = [size % self.chip.ring == 0 for size in self.shape]
        # The cubes of a three-dimensional slice are joined at all of their sides or at none.
        return tuple(whole) if self.chip.dimensions < 3 else (all(whole),) * len(whole)


def links_of(topology: Topology, mesh: Mesh) -> Links:
    """The links of a program on a mesh of a topology's devices.

    GPUs are numbered through, node by node.
    """
    if topology.chip.platform == "tpu":
        places = [tuple(device.coords[: len(topology.shape)]) for device in mesh.devices.flat]
    else:
        number = {device: index for index, device in enumerate(topology.devices)}
        places = [(number[device],) for device in mesh.devices.flat]
    return Links(topology.chip, topology.shape, places)


def network_seconds(sent: Iterable[Collective], links: Links) -> float:
    """Seconds of one collective after the other, each as slow as the slowest of its groups."""
    total = 0.0
    for one in sent:
        groups = [group for group in one.groups if len(set(group)) > 1]
        if groups:
            total += one.times * one.sent / min(_bandwidth(group, links) for group in groups)
    return total


def _bandwidth(group: Sequence[int], links: Links) -> float:
    """Bytes a second that a device of the group can send."""
    chip, places = links.chip, {links.places[device] for device in group}
    if not chip.node_devices:
        sides = [len(set(along)) for along in zip(*places)]
        ports = 1
        if math.prod(sides) == len(places):
            ports = sum(map(_ports, sides, links.shape, links.wraps))
        # The bandwidth is that of a ring, in which a chip has two.
        return chip.link_bandwidth * ports / 2
    # Between nodes, the rings of a group use the network cards of all its members in a node.
    nodes = [place[0] // chip.node_devices for place in places]
    if len(set(nodes)) == 1:
        return chip.link_bandwidth
    return min(min(map(nodes.count, nodes)) * chip.network_bandwidth, chip.link_bandwidth)


def _ports(side: int, size: int, wraps: bool) -> int:
    """Links of the worst connected chip of `side` chips along an axis of `size`."""
    return 0 if side == 1 else 2 if wraps and side == size else 1
