"""
Which device runs which rank: the chattiest axis nearest. Pure, no torch.

A topology is nodes of devices under leaf switches. `order_ranks` nests the axes by the bytes that they move, so that
tensor parallelism stays in a node, data-parallel groups are next nearest, and pipelines, which move least, cross nodes
(the mapping of MT-NLG, arXiv 2201.11990, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from trilithon_parallel.config import ModelError


@dataclass(frozen=True)
class Topology:
    """`nodes` of `devices_per_node`, of which `nodes_per_switch` hang on one leaf switch."""

    nodes: int
    devices_per_node: int
    nodes_per_switch: int = 1

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    def distance(self, a: int, b: int) -> int:
        """0 the same device, 1 the same node, 2 the same leaf switch, 3 beyond; devices are numbered node by node."""
        if a == b:
            return 0
        node_a, node_b = a // self.devices_per_node, b // self.devices_per_node
        if node_a == node_b:
            return 1
        return 2 if node_a // self.nodes_per_switch == node_b // self.nodes_per_switch else 3


def order_ranks(
    topology: Topology, bytes_per_axis: Mapping[str, float], *, tp: int, pp: int, dp: int
) -> tuple[int, ...]:
    """
    The device of every rank, rank = t + tp * (d + dp * p).

    Greedy: the axis with the most bytes is innermost; equal ones stand as tp, dp, pp, the least tolerant of delay
    first. Groups of the innermost axis never span nodes while they fit into one and enough devices are left.

    >>> order_ranks(Topology(2, 2), {"tp": 9, "dp": 1, "pp": 5}, tp=2, pp=1, dp=2)
    (0, 1, 2, 3)

    Args:
        bytes_per_axis: bytes that a rank sends in a step along "tp", "dp" and "pp".
    Raises:
        ModelError: `layout_invalid`, there are fewer devices than ranks.
    """
    sizes = {"tp": tp, "dp": dp, "pp": pp}
    if tp * dp * pp > topology.num_devices:
        raise ModelError(
            f"layout must have at most as many ranks as there are devices. Given: tp * pp * dp = {tp * pp * dp} ranks "
            f"and {topology.num_devices} devices.",
            code="layout_invalid",
        )
    inner, middle, outer = sorted(sizes, key=lambda axis: -bytes_per_axis.get(axis, 0.0))
    slots = _slots(topology, sizes[inner], tp * dp * pp)
    devices = [0] * (tp * dp * pp)
    places = product(range(sizes[outer]), range(sizes[middle]), range(sizes[inner]))
    for slot, (at_outer, at_middle, at_inner) in zip(slots, places, strict=True):
        at = {outer: at_outer, middle: at_middle, inner: at_inner}
        devices[at["tp"] + tp * (at["dp"] + dp * at["pp"])] = slot
    return tuple(devices)


def _slots(topology: Topology, group: int, count: int) -> list[int]:
    """The devices to fill, in order: whole groups in a node, where groups fit into one and enough nodes are there."""
    per_node = topology.devices_per_node // group * group
    if per_node and topology.nodes * per_node >= count:
        starts = range(0, topology.num_devices, topology.devices_per_node)
        return [start + device for start in starts for device in range(per_node)][:count]
    return list(range(count))
