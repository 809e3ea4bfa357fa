"""How long devices send: what each of them sends in a collective, over the links that its group has.

An estimate, and rather of the least time. A TPU's group that fills a box of its slice is taken to use all links inside
it, as fast as its worst connected member can: of an axis that it goes round in a ring a member has two links, at the end
of a line one. So a row of a v5e 4x4 has one, the whole slice, and a block of 2x2, two, a row of 16 two (it wraps around),
and all of a 16x16 four. A group that is no box has one. Where groups of one collective have strides, and so share links,
that costs nothing here.
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
    """Where a program's devices lie.

    Attributes:
      chip: of all of them.
      shape: of the slice, or the number of GPUs.
      places: in it, by a device's number in the program.
    """

    chip: Chip
    shape: tuple[int, ...]
    places: Sequence[tuple[int, ...]]

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which axes of the slice close to a ring."""
        whole = [size % self.chip.ring == 0 for size in self.shape]
        # The cubes of which a three-dimensional slice is made are joined at all of their sides or at none.
        return tuple(whole) if self.chip.dimensions < 3 else (all(whole),) * len(whole)


def links_of(topology: Topology, mesh: Mesh) -> Links:
    """Of a program on a mesh of a topology's devices. GPUs are numbered through, node by node."""
    if topology.chip.platform == "tpu":
        places = [tuple(device.coords[: len(topology.shape)]) for device in mesh.devices.flat]
    else:
        number = {device: index for index, device in enumerate(topology.devices)}
        places = [(number[device],) for device in mesh.devices.flat]
    return Links(topology.chip, topology.shape, places)


def network_seconds(sent: Iterable[Collective], links: Links) -> float:
    """One collective after the other, each as slow as the slowest of its groups."""
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
    """Links of the worst connected one of so many chips along an axis."""
    return 0 if side == 1 else 2 if wraps and side == size else 1
