"""
Boundary tensors between pipeline stages: two channels per directed pair of ranks, activations and gradients.

With two ranks and several chunks the rank before is the rank after, so what pairs messages must not be the peer alone.
Activations go over `grid.pp`, gradients over `grid.pp_back`, a process group each; in both, a pair's messages start in
the order of the table at both ends (`schedule.with_messages`), which is all that NCCL goes by. On gloo a tag names the
message as well.

Without sequence parallelism all tp ranks hold the same boundary tensor. Scatter/gather (arXiv 2104.04473, section 4.1)
sends 1/tp of it from each and gathers inside the tp group: b s h / t elements per message instead of b s h. With
sequence parallelism the tensor is a share already.
"""

from __future__ import annotations

from collections import deque
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilithon_parallel.collectives import Pending, all_gather, irecv, isend
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.schedule import Message

# Sends under way before the oldest is waited for: enough that a rank never waits for a peer that is a little late, few
# enough that sent tensors don't pile up.
_MAX_SENDS = 4


class PipelineError(RuntimeError):
    """
    A pipeline step cannot go on: its ranks run different tables, or a chunk broke its contract.

    `code` is pipeline_mispaired or pipeline_boundary. The process must end: peers wait for messages that won't come.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class Channels:
    """
    What one rank sends and receives during one step.

    Args:
        num_stages: of the whole pipeline.
        scatter_gather: send 1/tp of each tensor per tp rank; nothing changes where tp is 1 or with sequence
            parallelism.
        debug: a header before each tensor says what it is; messages pair by order alone, on every backend.
        timeout_s: longest wait for one message; None for the group's own.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        num_stages: int,
        dtype: torch.dtype,
        scatter_gather: bool,
        debug: bool,
        timeout_s: float | None,
    ) -> None:
        self._grid, self._num_stages, self._dtype = grid, num_stages, dtype
        self._scatters = scatter_gather and not grid.tp.is_trivial and not grid.sequence_parallel
        self._debug, self._timeout_s = debug, timeout_s
        self._sending: deque[Pending] = deque()
        self._receiving: dict[Message, tuple[Pending, tuple[int, ...]]] = {}

    def send(self, message: Message, x: Tensor) -> None:
        """Start sending; `x` is kept until it has left and must not change."""
        axis, dst = self._axis(message), self._grid.pp.ranks[message.dst]
        piece = split(x, self._grid.tp) if self._scatters else x.contiguous()
        if self._debug:
            header = self._header(message, piece.numel())
            self._sending.append(isend(header, axis, dst=dst, label=f"header of the {message}"))
        self._sending.append(isend(piece, axis, dst=dst, label=str(message), tag=self._tag(message)))
        while len(self._sending) > _MAX_SENDS:
            self._sending.popleft().wait(self._timeout_s)

    def post(self, message: Message, shape: tuple[int, ...]) -> None:
        """
        Start receiving a tensor of this shape; in debug mode wait for its header.

        Raises:
            PipelineError: pipeline_mispaired, another message came.
        """
        axis, src = self._axis(message), self._grid.pp.ranks[message.src]
        numel = prod(shape)
        size = (_part(numel, self._grid.tp),) if self._scatters else shape
        if self._debug:
            expected = self._header(message, prod(size))
            header = torch.empty_like(expected)
            irecv(header, axis, src=src, label=f"header of the {message}").wait(self._timeout_s)
            if not torch.equal(header, expected):
                raise PipelineError(
                    f"pipeline rank {self._grid.pp.rank} expected the {_described(expected)} from rank {message.src}. "
                    f"Given: the {_described(header)}. All ranks must run one table and one batch.",
                    code="pipeline_mispaired",
                )
        buffer = torch.empty(size, dtype=self._dtype, device=self._grid.device)
        pending = irecv(buffer, axis, src=src, label=str(message), tag=self._tag(message))
        self._receiving[message] = (pending, shape)

    def take(self, message: Message) -> Tensor:
        """The tensor of a message that was posted, when it is here."""
        pending, shape = self._receiving.pop(message)
        x = pending.wait(self._timeout_s)
        if not self._scatters:
            return x
        return all_gather(x, self._grid.tp, dim=0, label=f"gather of the {message}")[: prod(shape)].view(shape)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        while self._sending:
            self._sending.popleft().wait(self._timeout_s)

    def _axis(self, message: Message) -> Axis:
        axis = self._grid.pp if message.kind == "activation" else self._grid.pp_back
        assert axis is not None, "a grid with a pipeline has both axes"
        return axis

    def _tag(self, message: Message) -> int:
        return 0 if self._debug else message.microbatch * self._num_stages + message.stage

    def _header(self, message: Message, numel: int) -> Tensor:
        key = (_KINDS.index(message.kind), message.stage, message.microbatch, numel)
        return torch.tensor(key, dtype=torch.int64, device=self._grid.device)


def split(x: Tensor, axis: Axis) -> Tensor:
    """
    This rank's equal part of all elements of `x`, flat; the last parts are filled up with zeros.

    Where the rows divide by the ranks, it holds whole rows.
    """
    flat = x.reshape(-1)
    part = _part(flat.numel(), axis)
    piece = flat[axis.rank * part : (axis.rank + 1) * part]
    return pad(piece, (0, part - piece.numel()))


_KINDS = ("activation", "gradient")


def _part(numel: int, axis: Axis) -> int:
    return -(-numel // axis.size)


def _described(header: Tensor) -> str:
    kind, stage, microbatch, numel = header.tolist()
    return f"{_KINDS[kind]} of micro-batch {microbatch} for stage {stage} with {numel} elements"
