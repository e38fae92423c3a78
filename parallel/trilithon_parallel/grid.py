"""
The grid of ranks: tensor (tp), data (dp) and pipeline (pp) axes. An object that is handed in, never a global.

Rank order is tp fastest, then dp, then pp: `rank = t + tp * (d + dp * p)` (Megatron's "tp-dp-pp": the chattiest axis
stays inside a host, the quietest crosses hosts).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from trilithon_parallel.placement import stage_layers


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as one rank sees it: its place, the axis' size, the global ranks along it, their group."""

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def is_trivial(self) -> bool:
        """True when the axis has one rank: every collective along it is the identity."""
        return self.size == 1


@dataclass(frozen=True)
class Grid:
    """
    Where this rank stands. `world` is an axis too: all ranks in order, for plans and status.

    `layer_counts`: layers of every pipeline stage, None for as even as possible. `sequence_parallel`: between the
    tensor-parallel products each tp rank holds its share of the tokens (arXiv 2205.05198, section 4.2.2). `pp_back`
    is the pipeline axis with a group of its own, for gradients: they never meet activations; None without a pipeline.
    """

    tp: Axis
    pp: Axis
    dp: Axis
    world: Axis
    device: torch.device
    layer_counts: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    pp_back: Axis | None = None

    @property
    def rank(self) -> int:
        """This process' global rank."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """Ranks of all axes together."""
        return self.world.size

    @property
    def is_first_stage(self) -> bool:
        """True where tokens enter (the embedding)."""
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where logits leave (final norm and head)."""
        return self.pp.rank == self.pp.size - 1

    @property
    def prev_rank(self) -> int:
        """Global rank of the same (tp, dp) place on the stage before."""
        assert not self.is_first_stage
        return self.pp.ranks[self.pp.rank - 1]

    @property
    def next_rank(self) -> int:
        """Global rank of the same (tp, dp) place on the stage after."""
        assert not self.is_last_stage
        return self.pp.ranks[self.pp.rank + 1]

    @property
    def last_stage_rank(self) -> int:
        """Global rank of tp 0 on the last stage of this replica, where sampling happens."""
        return rank_of(0, self.dp.rank, self.pp.size - 1, tp=self.tp.size, dp=self.dp.size)

    def layers(self, num_layers: int) -> range:
        """The layers of this stage, by global id."""
        return stage_layers(num_layers, self.pp.size, self.layer_counts)[self.pp.rank]

    def chunk(self, index: int, virtual: int) -> Grid:
        """
        The grid as the model chunk `index` of `virtual` on this rank sees it: one of pp * virtual stages.

        Stage k is chunk k // pp of rank k % pp (arXiv 2104.04473, section 2.2). With one chunk a rank, the grid itself.
        """
        if virtual == 1:
            return self
        stages = tuple(self.pp.ranks[k % self.pp.size] for k in range(self.pp.size * virtual))
        place = Axis("pp", index * self.pp.size + self.pp.rank, len(stages), stages, self.pp.group)
        return replace(self, pp=place)

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> Grid:
        """The grid of one process: no process group is made or needed."""
        axes = {name: Axis(name, 0, 1, (0,)) for name in ("tp", "pp", "dp", "world")}
        return cls(axes["tp"], axes["pp"], axes["dp"], axes["world"], torch.device(device))

    @classmethod
    def build(cls, *, tp: int, pp: int, dp: int = 1, device: str | torch.device = "cpu") -> Grid:
        """
        The grid of this process after `rendezvous.join`; every rank must call it with the same sizes.

        Raises:
            ValueError: tp * pp * dp is not the number of ranks that joined.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if tp * pp * dp != world_size:
            raise ValueError(
                f"grid tp * pp * dp must be the number of ranks. Given: {tp} * {pp} * {dp} and "
                f"{world_size} ranks. Start {tp * pp * dp} ranks or change the layout."
            )
        if world_size == 1:
            return cls.single(device)
        rank = dist.get_rank()
        groups = axis_groups(tp=tp, pp=pp, dp=dp)
        axes = {name: make_axis(name, groups[name], rank) for name in groups}
        world = Axis("world", rank, world_size, tuple(range(world_size)), dist.group.WORLD)
        pp_back = make_axis("pp_back", groups["pp"], rank) if pp > 1 else None
        return cls(axes["tp"], axes["pp"], axes["dp"], world, torch.device(device), pp_back=pp_back)


def rank_of(tp_rank: int, dp_rank: int, pp_rank: int, *, tp: int, dp: int) -> int:
    """
    Global rank of a place in the grid.

    >>> rank_of(1, 0, 2, tp=2, dp=3)
    13
    """
    return tp_rank + tp * (dp_rank + dp * pp_rank)


def axis_groups(*, tp: int, pp: int, dp: int) -> dict[str, list[tuple[int, ...]]]:
    """
    Every group of every axis as global ranks; the groups of one axis partition the world. Pure.

    >>> axis_groups(tp=2, pp=4, dp=3)["dp"][:2]
    [(0, 2, 4), (1, 3, 5)]
    """
    return {
        "tp": [tuple(rank_of(t, d, p, tp=tp, dp=dp) for t in range(tp)) for p in range(pp) for d in range(dp)],
        "pp": [tuple(rank_of(t, d, p, tp=tp, dp=dp) for p in range(pp)) for d in range(dp) for t in range(tp)],
        "dp": [tuple(rank_of(t, d, p, tp=tp, dp=dp) for d in range(dp)) for p in range(pp) for t in range(tp)],
    }


def make_axis(name: str, groups: list[tuple[int, ...]], rank: int) -> Axis:
    """Make all groups of one axis (every rank must take part in making each) and keep the one that holds `rank`."""
    mine = Axis(name, 0, 1, (rank,))
    for ranks in groups:
        group = dist.new_group(list(ranks), group_desc=name) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Axis(name, ranks.index(rank), len(ranks), ranks, group)
    return mine
