"""
Parameters and their gradients in flat buckets: what the reduction over dp, the clipping and the optimizer work on.

A bucket holds parameters of one stage that are treated alike. Its parameters become views of one flat tensor and their
gradients views of another, in fp32 (fp64 for fp64 parameters), so each is reduced, cut over dp and gathered as one. The
sum over dp of a bucket begins when the last micro-batch has added to all of it, while the backward pass goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilithon_parallel.collectives import Pending, all_gather_, all_reduce_, start_all_reduce_, start_reduce_scatter
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Axis, Grid, make_axis, rank_of
from trilithon_parallel.placement import local_sizes, placement_of, source_name, stage_names
from trilithon_parallel.shapes import model_of

# Elements after which a bucket is full: 16 MiB of gradients, several of them in a backward pass of any model.
BUCKET_ELEMENTS = 2**22
# A bucket's size is a multiple of this times dp, so that every rank's share is aligned.
SHARE_MULTIPLE = 128


@dataclass(frozen=True)
class Kind:
    """
    What makes parameters alike: `decays` (AdamW's weight decay), `rate` (a factor of the learning rate), and over whom
    their gradients are summed before dp.

    `sum_over` is "none", "tp" (replicated, each rank having seen its own tokens, or its own part of an adapted
    product), "kv" (copies of a key/value group) or the name of the tensor that stages hold copies of. `replicas`:
    ranks along tp that hold the very same elements.
    """

    decays: bool
    rate: float
    sum_over: str
    replicas: int


@dataclass(frozen=True)
class Slot:
    """A parameter's place in its bucket: its elements from `start` on. `owner` is its name in checkpoints."""

    name: str
    owner: str
    parameter: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        """The first element after it."""
        return self.start + self.parameter.numel()


@dataclass(eq=False)
class Bucket:
    """One flat run of parameters. `share`: the elements whose optimizer state this rank keeps."""

    kind: Kind
    slots: list[Slot]
    data: Tensor
    grad: Tensor
    share: slice
    counts_in_norm: bool
    is_owner: bool
    waiting: int | None = None
    """Parameters whose last gradient is still to come; None before the last micro-batch."""
    pending: Pending | None = None

    @property
    def grad_share(self) -> Tensor:
        """This rank's part of the summed gradients."""
        return self.grad[self.share]


class Buckets:
    """
    The buckets of all model chunks of this rank. Parameters are zero afterwards: fill them then.

    Args:
        chunks: each model chunk's stage with the grid as it sees it (`Grid.chunk`), in order. Only parameters that
            require a gradient are taken.
        grid: of the rank.
        virtual: chunks per rank.
        distributed: cut every bucket's optimizer state over dp (ZeRO-1, arXiv 1910.02054, section 5.1).
        rate_of: canonical name -> factor of the learning rate, at least 0; the same on every rank.
    """

    def __init__(
        self,
        chunks: Sequence[tuple[nn.Module, Grid]],
        config: ModelConfig,
        grid: Grid,
        *,
        virtual: int,
        distributed: bool,
        bucket_elements: int = BUCKET_ELEMENTS,
        rate_of: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        self.grid, self.distributed = grid, distributed
        tied = _tied_axes(config, grid, virtual)
        self._axes = {"tp": grid.tp, "kv": _replica_axis(config, grid), **tied}
        self.buckets: list[Bucket] = []
        self._of_chunk: list[list[Bucket]] = []
        for stage, place in chunks:
            groups: dict[Kind, list[tuple[str, nn.Parameter]]] = {}
            # In the order in which the backward pass reaches them.
            parameters = [(name, p) for name, p in stage.named_parameters() if p.requires_grad][::-1]
            for name, parameter in parameters:
                kind = _kind(name, parameter, config, place, tied, rate_of)
                groups.setdefault(kind, []).append((name, parameter))
            runs = [(kind, held) for kind, members in groups.items() for held in _fill(members, bucket_elements)]
            place_of = {name: index for index, (name, _) in enumerate(parameters)}
            runs.sort(key=lambda run: place_of[run[1][-1][0]])  # by their ends, so none waits for one that ends later
            made = [self._make(kind, held, config) for kind, held in runs]
            self._of_chunk.append(made)
            self.buckets += made
        # Those that need no other sum first. The last chunk's backward pass ends first.
        self._early = [bucket for made in reversed(self._of_chunk) for bucket in made if bucket.kind.sum_over == "none"]
        self._late = [bucket for bucket in self.buckets if bucket.kind.sum_over != "none"]
        # In the order of their names, no two stages that hold several tensors in common wait for each other crosswise.
        self._late.sort(key=lambda bucket: (bucket.kind.sum_over in tied, bucket.kind.sum_over))

    def _make(self, kind: Kind, held: Sequence[tuple[str, nn.Parameter]], config: ModelConfig) -> Bucket:
        first = held[0][1]
        multiple = SHARE_MULTIPLE * self.grid.dp.size
        size = -(-sum(parameter.numel() for _, parameter in held) // multiple) * multiple
        wide = first.dtype if first.dtype == torch.float64 else torch.float32
        data, grad = first.new_zeros(size), first.new_zeros(size, dtype=wide)
        share = slice(0, size)
        if self.distributed:
            each = size // self.grid.dp.size
            share = slice(self.grid.dp.rank * each, (self.grid.dp.rank + 1) * each)
        slots, start = [], 0
        for name, parameter in held:
            slots.append(Slot(name, source_name(name, config), parameter, start))
            start = slots[-1].stop
        is_first_copy = self.grid.tp.rank % kind.replicas == 0
        is_owner = is_first_copy and all(slot.name == slot.owner for slot in slots)
        counts = is_owner and (self.distributed or self.grid.dp.rank == 0)
        bucket = Bucket(kind, slots, data, grad, share, counts, is_owner)
        for slot in slots:
            self._adopt(slot, bucket)
        return bucket

    def _adopt(self, slot: Slot, bucket: Bucket) -> None:
        """Move a parameter, which is not filled yet, and its gradient into the bucket; padding stays zero for good."""
        parameter, span = slot.parameter, slice(slot.start, slot.stop)
        parameter.data = bucket.data[span].view(parameter.shape)
        main_grad = bucket.grad[span].view(parameter.shape)
        parameter.main_grad = main_grad  # type: ignore[attr-defined]  # kernels that add weights' gradients look for it
        if parameter.dtype == main_grad.dtype:
            parameter.grad = main_grad  # autograd adds to it in place

        def arrived(leaf: Tensor) -> None:
            """Runs once a backward pass, after all of it that leads to this parameter, whoever added the gradient."""
            if leaf.grad is not None and leaf.dtype != main_grad.dtype:
                main_grad.add_(leaf.grad)
                leaf.grad = None
            if bucket.waiting:
                bucket.waiting -= 1
                self._start_ready()

        parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]  # torch's is untyped

    def zero(self) -> None:
        """Begin a step: all gradients are zero."""
        for bucket in self.buckets:
            bucket.grad.zero_()
            bucket.waiting, bucket.pending = None, None

    def expect_last(self, chunk: int) -> None:
        """What the backward pass of this chunk adds from here on is its last micro-batch's."""
        for bucket in self._of_chunk[chunk]:
            bucket.waiting = len(bucket.slots)

    def _start_ready(self) -> None:
        """Start reductions over dp in the buckets' order, which is the same on every rank, as far as they are ready."""
        if self.grid.dp.is_trivial:
            return
        for bucket in self._early:
            if bucket.pending is None:
                if bucket.waiting != 0:
                    return
                self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        start = start_reduce_scatter if self.distributed else start_all_reduce_
        bucket.pending = start(bucket.grad, self.grid.dp, label="gradients")

    def reduce(self) -> None:
        """End of the backward pass: sum what ranks hold copies of, then over dp; wait until all of it is there."""
        for bucket in self._late:
            all_reduce_(bucket.grad, self._axes[bucket.kind.sum_over], label=f"gradients.{bucket.kind.sum_over}")
        for bucket in (*self._early, *self._late):
            if bucket.pending is None:
                self._start(bucket)
        for bucket in self.buckets:
            assert bucket.pending is not None
            share = bucket.pending.wait()
            if share.data_ptr() != bucket.grad.data_ptr():
                bucket.grad_share.copy_(share)
            bucket.pending = None

    def gather(self) -> None:
        """After the optimizer's step: every rank gets the parameters that others have moved."""
        if self.distributed:
            for bucket in self.buckets:
                all_gather_(bucket.data, self.grid.dp, label="parameters")

    def slots(self) -> Iterator[tuple[Bucket, Slot]]:
        """Every parameter with its bucket."""
        return ((bucket, slot) for bucket in self.buckets for slot in bucket.slots)


def _fill(members: Iterable[tuple[str, nn.Parameter]], limit: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Runs of parameters of at most `limit` elements together, or of one that is larger."""
    run: list[tuple[str, nn.Parameter]] = []
    for name, parameter in members:
        if run and sum(p.numel() for _, p in run) + parameter.numel() > limit:
            yield run
            run = []
        run.append((name, parameter))
    if run:
        yield run


def _kind(
    name: str,
    parameter: nn.Parameter,
    config: ModelConfig,
    grid: Grid,
    tied: Container[str],
    rate_of: Callable[[str], float],
) -> Kind:
    """How a parameter of the stage at `grid` is treated; `tied`: tensors that several stages hold copies of."""
    owner = source_name(name, config)
    rule = placement_of(owner)
    sizes = local_sizes(model_of(owner, config)[1], grid.tp.size)
    replicas, sum_over = 1, "none"
    if rule.cut is None:
        replicas = grid.tp.size
        if replicas > 1 and (rule.is_partial or (grid.sequence_parallel and not rule.is_whole)):
            sum_over = "tp"
    elif rule.cut == "kv" and sizes.kv_replicas > 1:
        replicas, sum_over = sizes.kv_replicas, "kv"
    if owner in tied:
        assert sum_over == "none", f"{name} is tied and {sum_over}-replicated"
        sum_over = owner
    rate = rate_of(owner)
    if not (math.isfinite(rate) and rate >= 0.0):
        raise ValueError(f"learning-rate factor of {owner} must be a number from 0 up. Given: {rate!r}.")
    return Kind(parameter.dim() > 1, rate, sum_over, replicas)


def _replica_axis(config: ModelConfig, grid: Grid) -> Axis:
    """The ranks that hold the same key/value group."""
    replicas, tp = local_sizes(config, grid.tp.size).kv_replicas, grid.tp.size
    if replicas == 1:
        return Axis("kv", 0, 1, (grid.rank,))
    groups = [
        tuple(rank_of(t, d, p, tp=tp, dp=grid.dp.size) for t in range(first, first + replicas))
        for p in range(grid.pp.size)
        for d in range(grid.dp.size)
        for first in range(0, tp, replicas)
    ]
    return make_axis("kv", groups, grid.rank)


def _tied_axes(config: ModelConfig, grid: Grid, virtual: int) -> dict[str, Axis]:
    """For each tensor that several stages hold copies of, the ranks that do; every rank makes all of the groups."""
    stages = grid.pp.size * virtual
    places: dict[str, list[int]] = {}
    for stage in range(stages):
        names = stage_names(config, pp=stages, pp_rank=stage, counts=grid.layer_counts)
        for owner in dict.fromkeys(source_name(name, config) for name in names):
            places.setdefault(owner, []).append(stage % grid.pp.size)
    axes = {}
    for owner, ranks in places.items():
        if len(ranks) > 1:
            assert len(set(ranks)) == len(ranks), f"a rank would hold {owner} twice"
            groups = [
                tuple(rank_of(t, d, p, tp=grid.tp.size, dp=grid.dp.size) for p in sorted(ranks))
                for d in range(grid.dp.size)
                for t in range(grid.tp.size)
            ]
            axes[owner] = make_axis("tied", groups, grid.rank)
    return axes


def rectangles(shape: Sequence[int], start: int, stop: int) -> list[tuple[slice, ...]]:
    """
    The elements `start` to `stop` of a flattened tensor as rectangles of its shape, in order: at most three.

    >>> [[(s.start, s.stop) for s in rectangle] for rectangle in rectangles((4, 10), 7, 25)]
    [[(0, 1), (7, 10)], [(1, 2), (0, 10)], [(2, 3), (0, 5)]]
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [(slice(start, stop),)]
    rows, width = shape
    assert stop <= rows * width
    borders = sorted({start, min(stop, -(-start // width) * width), max(start, stop // width * width), stop})
    found: list[tuple[slice, ...]] = []
    for first, last in itertools.pairwise(borders):
        top, left = divmod(first, width)
        size = last - first
        if left == 0 and size % width == 0:
            found.append((slice(top, top + size // width), slice(0, width)))
        else:
            found.append((slice(top, top + 1), slice(left, left + size)))
    return found
