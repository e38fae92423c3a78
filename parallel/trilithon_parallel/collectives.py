"""
The few collectives, the only module that calls `torch.distributed` for tensors.

Every call carries a label, so that a peer's death or a timeout says what was waited for, and costs nothing along an
axis of one rank. Out of place unless the name ends in `_`. Only SUM is used: AVG and PREMUL_SUM differ by backend.
The autograd pairs f and g of Megatron-LM (arXiv 1909.08053, section 3) stand at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trilithon_parallel.grid import Axis, Grid


class CollectiveError(RuntimeError):
    """A collective failed: a peer left or did not come in time. `label`, `axis` and `ranks` say where."""

    def __init__(self, label: str, axis: Axis, cause: BaseException) -> None:
        first = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        super().__init__(f"collective {label!r} over {axis.name} ranks {list(axis.ranks)} failed: {first}")
        self.label, self.axis_name, self.ranks = label, axis.name, axis.ranks


@dataclass(frozen=True)
class Call:
    """One recorded call: what was communicated along which axis, how many elements this rank gave."""

    label: str
    axis: str
    op: str
    elements: int
    dtype: torch.dtype


class Observer(Protocol):
    """Told when this process begins to wait for peers, and when it has them; must cost next to nothing."""

    def begin(self, op: str, label: str, axis: Axis) -> None:
        """The collective, send or receive `label` starts."""

    def end(self) -> None:
        """The one that began last is done (not told when it failed: it stays the one that was waited for)."""

    def moved(self) -> None:
        """Work of this process alone is done: a micro-batch's forward or backward pass."""


_recorders: list[list[Call]] = []
_observers: list[Observer] = []


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Record every collective of this process inside the block (tests compare the list with the cost model)."""
    calls: list[Call] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders.remove(calls)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every wait for peers of this process inside the block (the watchdog listens here)."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def _guard(op: str, label: str, axis: Axis, x: Tensor) -> Iterator[None]:
    for calls in _recorders:
        calls.append(Call(label, axis.name, op, x.numel(), x.dtype))
    with _waiting(op, label, axis):
        yield


@contextmanager
def _waiting(op: str, label: str, axis: Axis) -> Iterator[None]:
    for observer in _observers:
        observer.begin(op, label, axis)
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(label, axis, error) from error
    for observer in _observers:
        observer.end()


def moved() -> None:
    """Tell the observers that this process has got on, where it waits for nobody."""
    for observer in _observers:
        observer.moved()


def all_reduce(x: Tensor, axis: Axis, *, label: str) -> Tensor:
    """Sum of `x` over the axis, in a new tensor (`x` itself where the axis has one rank)."""
    if axis.is_trivial:
        return x
    return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis, label=label)


def all_reduce_(x: Tensor, axis: Axis, *, label: str) -> Tensor:
    """Sum over the axis in place; `x` must be contiguous."""
    if not axis.is_trivial:
        with _guard("all_reduce", label, axis, x):
            dist.all_reduce(x, group=axis.group)
    return x


def all_reduce_max(x: Tensor, axis: Axis, *, label: str) -> Tensor:
    """Element-wise maximum over the axis."""
    if axis.is_trivial:
        return x
    result = x.clone(memory_format=torch.contiguous_format)
    with _guard("all_reduce_max", label, axis, x):
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=axis.group)
    return result


def all_gather(x: Tensor, axis: Axis, *, dim: int, label: str) -> Tensor:
    """The shards of all ranks of the axis, joined along `dim` in rank order; every shard has the same shape."""
    if axis.is_trivial:
        return x
    source = x.contiguous()
    gathered = source.new_empty((axis.size, *source.shape))
    with _guard("all_gather", label, axis, x):
        # torch 2.13 renames these two operations and deprecates the older names: the choice is made here alone.
        if hasattr(dist, "all_gather_single"):
            dist.all_gather_single(gathered.view(-1), source.view(-1), group=axis.group)
        else:
            dist.all_gather_into_tensor(gathered.view(-1), source.view(-1), group=axis.group)
    return gathered.flatten(0, 1) if dim == 0 else torch.cat(gathered.unbind(0), dim=dim)


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int, label: str) -> Tensor:
    """Sum over the axis, of which each rank keeps its equal share along `dim`."""
    if axis.is_trivial:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"reduce_scatter {label!r}: dim {dim} of {tuple(x.shape)} must be a multiple of {axis.size}.")
    source = torch.stack(x.chunk(axis.size, dim=dim))
    share = start_reduce_scatter(source.view(-1), axis, label=label).wait()
    return share.view(source.shape[1:])


def start_all_reduce_(x: Tensor, axis: Axis, *, label: str) -> Pending:
    """Begin a sum over the axis in place; `x` must be contiguous and stay untouched until `wait()`."""
    if axis.is_trivial:
        return Pending(None, label, axis, x)
    with _guard("all_reduce", label, axis, x):
        return Pending(dist.all_reduce(x, group=axis.group, async_op=True), label, axis, x)


def start_reduce_scatter(x: Tensor, axis: Axis, *, label: str) -> Pending:
    """
    Begin a sum of flat tensors of which each rank gets its equal share, in rank order; `wait()` returns that.

    On CPUs shares are exchanged and added in rank order: gloo's own reduce-scatter sends everything to everyone.
    """
    if axis.is_trivial:
        return Pending(None, label, axis, x)
    if x.device.type == "cpu":
        shares = torch.empty_like(x)
        with _guard("reduce_scatter", label, axis, x):
            work = dist.all_to_all_single(shares, x, group=axis.group, async_op=True)
        return Pending(work, label, axis, shares, finish=lambda shares: shares.view(axis.size, -1).sum(0))
    share = x.new_empty(x.numel() // axis.size)
    with _guard("reduce_scatter", label, axis, x):
        start = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
        return Pending(start(share, x, group=axis.group, async_op=True), label, axis, share)


def all_gather_(x: Tensor, axis: Axis, *, label: str) -> Tensor:
    """Fill a flat tensor from its equal shares: each rank's own is in place already."""
    if not axis.is_trivial:
        share = x.chunk(axis.size)[axis.rank].clone()
        with _guard("all_gather", label, axis, share):
            gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
            gather(x, share, group=axis.group)
    return x


def broadcast_(x: Tensor, axis: Axis, *, src: int, label: str) -> Tensor:
    """Overwrite `x` with that of the global rank `src`, in place; shape and dtype are agreed beforehand."""
    if not axis.is_trivial:
        with _guard("broadcast", label, axis, x):
            dist.broadcast(x, src=src, group=axis.group)
    return x


def barrier(axis: Axis, *, label: str, timeout_s: float | None = None) -> None:
    """Wait until every rank of the axis is here."""
    if axis.is_trivial:
        return
    token = torch.zeros(1, dtype=torch.int64)
    with _guard("barrier", label, axis, token):
        work = dist.all_reduce(token, group=axis.group, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=timeout_s)) if timeout_s is not None else work.wait()


class Pending:
    """
    Communication under way. `wait()` ends it; the tensor must stay alive and untouched until then.

    `finish` makes of the tensor what `wait()` returns, when all of it is there.
    """

    def __init__(
        self, work: Any, label: str, axis: Axis, tensor: Tensor, *, finish: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._work, self._label, self._axis, self.tensor, self._finish = work, label, axis, tensor, finish

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Block until done, at most `timeout_s` (the group's own limit by default), and return the tensor."""
        if self._work is not None:
            with _waiting("wait for", self._label, self._axis):
                self._work.wait() if timeout_s is None else self._work.wait(timedelta(seconds=timeout_s))
        return self.tensor if self._finish is None else self._finish(self.tensor)


def isend(x: Tensor, axis: Axis, *, dst: int, label: str, tag: int = 0) -> Pending:
    """Start sending `x` to the global rank `dst`; gloo matches by pair, tag and order, NCCL by order alone."""
    x = x.contiguous()
    with _guard("send", label, axis, x):
        return Pending(dist.isend(x, dst, group=axis.group, tag=tag), label, axis, x)


def irecv(x: Tensor, axis: Axis, *, src: int, label: str, tag: int = 0) -> Pending:
    """Start receiving into `x` (contiguous) from the global rank `src`."""
    with _guard("recv", label, axis, x):
        return Pending(dist.irecv(x, src, group=axis.group, tag=tag), label, axis, x)


def send(x: Tensor, axis: Axis, *, dst: int, label: str, tag: int = 0, timeout_s: float | None = None) -> None:
    """Send `x` to the global rank `dst` and wait until it has left."""
    isend(x, axis, dst=dst, label=label, tag=tag).wait(timeout_s)


def recv(x: Tensor, axis: Axis, *, src: int, label: str, tag: int = 0, timeout_s: float | None = None) -> Tensor:
    """Receive into `x` from the global rank `src` and return it."""
    return irecv(x, axis, src=src, label=label, tag=tag).wait(timeout_s)


class _CopyToTp(torch.autograd.Function):
    """f: identity forward, all-reduce backward. Stands before column-parallel products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.axis, label="f.backward"), None


class _ReduceFromTp(torch.autograd.Function):
    """g: all-reduce forward, identity backward. Stands after row-parallel products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis, label="g.forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    """g-bar's gather: all-gather of the tokens forward, reduce-scatter backward. Before column-parallel products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, dim=0, label="gather_sequence.forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis, dim=0, label="gather_sequence.backward"), None


class _GatherTokens(torch.autograd.Function):
    """All-gather of the tokens forward; backward each rank keeps its own of a gradient that every rank has whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, dim=0, label="gather_tokens.forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.axis.size)[ctx.axis.rank], None


class _ScatterSequence(torch.autograd.Function):
    """Reduce-scatter of the tokens forward, all-gather backward. After row-parallel products and the embedding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis, dim=0, label="scatter_sequence.forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis, dim=0, label="scatter_sequence.backward"), None


def enter_columns(x: Tensor, grid: Grid) -> Tensor:
    """
    What stands before column-parallel products: [T, H] or, with sequence parallelism, [T / tp, H] -> [T, H].

    The paper's f, or g-bar's all-gather (arXiv 2205.05198, figure 5).
    """
    if not grid.sequence_parallel or grid.tp.is_trivial:
        return copy_to_tp(x, grid.tp)
    result: Tensor = _GatherSequence.apply(x, grid.tp)  # type: ignore[no-untyped-call]  # torch's apply is untyped
    return result


def gather_tokens(x: Tensor, grid: Grid) -> Tensor:
    """What stands before a part that every rank runs alike over all tokens: [T / tp, H] -> [T, H], or nothing."""
    if not grid.sequence_parallel or grid.tp.is_trivial:
        return x
    result: Tensor = _GatherTokens.apply(x, grid.tp)  # type: ignore[no-untyped-call]  # torch's apply is untyped
    return result


def leave_rows(x: Tensor, grid: Grid) -> Tensor:
    """
    What stands after row-parallel products: the ranks' shares [T, H] -> their sum, [T, H] or [T / tp, H].

    The paper's g, or g-bar's reduce-scatter. May reuse `x`, which the caller must not use again.
    """
    if not grid.sequence_parallel or grid.tp.is_trivial:
        return reduce_from_tp(x, grid.tp)
    result: Tensor = _ScatterSequence.apply(x, grid.tp)  # type: ignore[no-untyped-call]  # as above
    return result


def copy_to_tp(x: Tensor, axis: Axis) -> Tensor:
    """The paper's f: the input of column-parallel products."""
    if axis.is_trivial or not torch.is_grad_enabled():
        return x
    result: Tensor = _CopyToTp.apply(x, axis)  # type: ignore[no-untyped-call]  # torch's apply is untyped
    return result


def reduce_from_tp(x: Tensor, axis: Axis) -> Tensor:
    """The paper's g: the output of row-parallel products. May reuse `x`, which the caller must not use again."""
    if axis.is_trivial:
        return x
    if not torch.is_grad_enabled():
        return all_reduce_(x.contiguous(), axis, label="g")
    result: Tensor = _ReduceFromTp.apply(x, axis)  # type: ignore[no-untyped-call]  # as above
    return result
