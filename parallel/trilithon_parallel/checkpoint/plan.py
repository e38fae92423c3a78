"""
Which bytes go where when parameters move from one layout to another: pure, from names and sizes alone.

Every rank computes the same list, so a hand-over from training ranks to serving ranks needs no negotiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trilithon_parallel.checkpoint.piece import Slices
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import rank_of
from trilithon_parallel.layout import Layout
from trilithon_parallel.placement import LocalSlice, global_shapes, local_slice, source_name, stage_names


@dataclass(frozen=True)
class Move:
    """
    A rectangle of one global tensor on its way: `src_slices` and `dst_slices` are within the ranks' own tensors.

    Attributes:
        name: of the global tensor.
        src_name, dst_name: of the parameter that holds it there: `name`, or `lm_head.weight` for the last stage's copy
            of a tied embedding.
    """

    name: str
    src_rank: int
    src_name: str
    src_slices: Slices
    dst_rank: int
    dst_name: str
    dst_slices: Slices

    @property
    def is_local(self) -> bool:
        """Whether nothing has to be sent, where both layouts count the same ranks."""
        return self.src_rank == self.dst_rank


@dataclass(frozen=True)
class Held:
    """What a rank holds of a global tensor: its parameter's name, and where the true part of it comes from."""

    rank: int
    parameter: str
    place: LocalSlice


def holdings(layout: Layout, config: ModelConfig) -> dict[str, list[Held]]:
    """Global tensor -> every rank's part of it, replicas and tied copies included, in rank order."""
    shapes = global_shapes(config)
    found: dict[str, list[Held]] = {name: [] for name in shapes}
    for pp_rank in range(layout.pp):
        for chunk in range(layout.virtual):
            stage = chunk * layout.pp + pp_rank
            names = stage_names(config, pp=layout.pp * layout.virtual, pp_rank=stage, counts=layout.layer_counts)
            for parameter in names:
                name = source_name(parameter, config)
                for tp_rank in range(layout.tp):
                    place = local_slice(name, shapes[name], config=config, tp=layout.tp, tp_rank=tp_rank)
                    for dp_rank in range(layout.dp):
                        rank = rank_of(tp_rank, dp_rank, pp_rank, tp=layout.tp, dp=layout.dp)
                        found[name].append(Held(rank, parameter, place))
    return {name: sorted(held, key=lambda item: (item.rank, item.parameter)) for name, held in found.items()}


def plan(src_layout: Layout, dst_layout: Layout, config: ModelConfig) -> list[Move]:
    """
    The moves that fill every rank's parameters at `dst_layout` from those at `src_layout`; padding stays zero.

    Each element of each destination is covered by exactly one move. A rank that holds an element at both layouts gets
    it from itself; of several sources the replicas take turns.

    Args:
        src_layout, dst_layout: ranks are counted from 0 in both; a caller with disjoint ranks adds its offset, and then
            no move is local.
        config: of the model.
    Returns:
        Moves in the order of names, destinations and positions; the same on every rank.
    """
    moves: list[Move] = []
    sources, targets = holdings(src_layout, config), holdings(dst_layout, config)
    for name, held in targets.items():
        for target in held:
            for source, block in _cover(target, sources[name]):
                src_slices, dst_slices = _within(block, source.place.slices), _within(block, target.place.slices)
                moves.append(
                    Move(name, source.rank, source.parameter, src_slices, target.rank, target.parameter, dst_slices)
                )
    return moves


def _cover(target: Held, sources: list[Held]) -> Iterator[tuple[Held, Slices]]:
    """
    Sources for every part of a target, with the part.

    Only one dim is cut, and rectangles of one layout are equal or disjoint along it: the distinct ones are taken in
    order and each is met with the target's.
    """
    replicas: dict[tuple[tuple[int, int], ...], list[Held]] = {}
    for source in sources:
        replicas.setdefault(tuple((item.start, item.stop) for item in source.place.slices), []).append(source)
    for bounds, held in sorted(replicas.items()):
        block = tuple(
            slice(max(start, item.start), min(stop, item.stop))
            for (start, stop), item in zip(bounds, target.place.slices, strict=True)
        )
        if all(item.start < item.stop for item in block):
            own = [source for source in held if source.rank == target.rank]
            same_name = [source for source in own if source.parameter == target.parameter]
            yield (same_name or own or [held[target.rank % len(held)]])[0], block


def _within(block: Slices, held: Slices) -> Slices:
    """Global slices as positions within the rank's tensor, whose true part begins at `held`."""
    return tuple(
        slice(item.start - outer.start, item.stop - outer.start) for item, outer in zip(block, held, strict=True)
    )
