"""Which device runs which rank: tensor parallelism in the node, then the axis with more bytes."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_parallel.config import ModelError
from trilithon_parallel.costs import PlannedLayout
from trilithon_parallel.grid import axis_groups
from trilithon_parallel.memory import PAPER_NUMERICS
from trilithon_parallel.presets import MT_NLG_530B
from trilithon_parallel.timing import traffic
from trilithon_parallel.topology import Topology, order_ranks

USUAL = {"tp": 100.0, "dp": 10.0, "pp": 1.0}


def farthest(topology: Topology, devices: tuple[int, ...], groups: list[tuple[int, ...]]) -> int:
    """The largest distance inside any group."""
    return max((topology.distance(devices[a], devices[b]) for g in groups for a, b in combinations(g, 2)), default=0)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(8, 2, 1), (4, 2, 2), (8, 1, 2)])
def test_tensor_groups_stay_in_a_node(tp: int, pp: int, dp: int) -> None:
    """
    On two nodes of eight no tensor-parallel group spans nodes; with (4, 2, 2) replicas are nearer than stages.

    Inverse: sorting the axes by fewest bytes turns it red.
    """
    topology = Topology(2, 8)
    devices = order_ranks(topology, USUAL, tp=tp, pp=pp, dp=dp)
    groups = axis_groups(tp=tp, pp=pp, dp=dp)

    assert farthest(topology, devices, groups["tp"]) == 1
    if (tp, pp, dp) == (4, 2, 2):
        assert farthest(topology, devices, groups["dp"]) == 1
        assert farthest(topology, devices, groups["pp"]) > 1


def test_mapping_of_mt_nlg() -> None:
    """The bytes of the recipe's own layout give its mapping: tensor, then data, then pipeline (arXiv 2201.11990)."""
    layout = PlannedLayout(8, 35, 8, 1, recompute="full")
    sent = traffic(MT_NLG_530B.config, layout, PAPER_NUMERICS, seq_len=2048, global_batch=1920)
    topology = Topology(280, 8, nodes_per_switch=8)

    devices = order_ranks(topology, {"tp": sent.tensor, "dp": sent.data, "pp": sent.pipeline}, tp=8, pp=35, dp=8)

    assert devices == tuple(range(8 * 35 * 8))
    groups = axis_groups(tp=8, pp=35, dp=8)
    assert farthest(topology, devices, groups["tp"]) == 1
    assert farthest(topology, devices, groups["dp"]) == 2


@given(nodes=st.integers(1, 6), per_node=st.integers(1, 6), data=st.data())
def test_every_rank_has_its_own_device(nodes: int, per_node: int, data: st.DataObject) -> None:
    """A permutation of devices, whatever the sizes; groups that fit a node stay in one while there is room."""
    topology = Topology(nodes, per_node)
    tp = data.draw(st.integers(1, nodes * per_node))
    dp = data.draw(st.integers(1, nodes * per_node // tp))
    pp = data.draw(st.integers(1, nodes * per_node // (tp * dp)))
    weights = {axis: data.draw(st.integers(0, 3)) for axis in ("tp", "dp", "pp")}
    devices = order_ranks(topology, weights, tp=tp, pp=pp, dp=dp)

    assert len(set(devices)) == len(devices) == tp * dp * pp
    assert all(0 <= device < topology.num_devices for device in devices)
    if tp <= per_node and nodes * (per_node // tp) >= dp * pp and weights["tp"] >= max(weights.values()):
        assert farthest(topology, devices, axis_groups(tp=tp, pp=pp, dp=dp)["tp"]) <= 1


def test_too_few_devices() -> None:
    """More ranks than devices are refused with both numbers."""
    with pytest.raises(ModelError, match="tp \\* pp \\* dp = 16 ranks and 8 devices"):
        order_ranks(Topology(1, 8), USUAL, tp=4, pp=2, dp=2)
