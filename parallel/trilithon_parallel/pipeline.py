"""
The one executor of schedule tables: it walks a rank's steps and knows no schedule by name.

A step takes what an op needs, runs it, keeps what its backward will need and hands on what it made. Parameters gather
their gradients by autograd, micro-batch 0 to m - 1 in every table, so that without tied weights a pipeline gives the
bits of one process. Between forward and backward only the graph of a chunk is kept, not its output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from trilithon_parallel.collectives import moved
from trilithon_parallel.grid import Grid
from trilithon_parallel.p2p import Channels, PipelineError
from trilithon_parallel.schedule import Message, Recv, Run, Send, Step


class Chunk(Protocol):
    """One model chunk of this rank: chunk c is stage c * pp + pp_rank. [T, H] is the boundary between stages."""

    def forward(self, microbatch: int, received: Tensor | None) -> Tensor:
        """
        Run one micro-batch.

        Args:
            received: the boundary tensor of the stage before; None on the first stage. A leaf that wants a gradient.
        Returns:
            The boundary tensor for the next stage; on the last stage the scalar loss, scaled as its gradient shall be.
        """

    def boundary_shape(self, microbatch: int) -> tuple[int, ...]:
        """The shape of what `forward` receives for this micro-batch; not asked on the first stage."""


@dataclass(frozen=True)
class _Kept:
    """What a backward needs: where the gradient goes in (None: no parameter before wants one), and comes out."""

    output: GradientEdge | None
    output_shape: tuple[int, ...]
    received: Tensor | None


def run(
    steps: Sequence[Step],
    chunks: Sequence[Chunk],
    grid: Grid,
    *,
    dtype: torch.dtype,
    scatter_gather: bool,
    before_last_backward: Callable[[int], None] | None = None,
    on_backward_done: Callable[[int], None] | None = None,
    debug: bool = False,
    timeout_s: float | None = None,
) -> list[Tensor]:
    """
    Run this rank's steps, `with_messages(table)[grid.pp.rank]`; every rank of the pipeline calls it together.

    Tables without backwards run under no_grad and keep nothing.

    Args:
        chunks: the model chunks of this rank, as many as the table has.
        dtype: of the boundary tensors, so also of their gradients.
        scatter_gather: each tp rank sends its share of a boundary tensor and gathers inside the tp group.
        before_last_backward: told the chunk whose last backward is about to begin.
        on_backward_done: told the chunk whose last backward is done and whose gradients are complete, as soon as the
            gradient for the stage before is on its way.
        debug: check with a header that each message is the expected one. Costs a wait per message.
        timeout_s: longest wait for one message; None for the group's own.
    Returns:
        On the last stage the detached losses, micro-batch by micro-batch; elsewhere an empty list.
    Raises:
        PipelineError: pipeline_mispaired, in debug mode; pipeline_boundary, a chunk gave another dtype or does not
            depend on what it received.
        CollectiveError: a peer left or did not come in time.
    """
    num_stages = grid.pp.size * len(chunks)
    channels = Channels(
        grid, num_stages=num_stages, dtype=dtype, scatter_gather=scatter_gather, debug=debug, timeout_s=timeout_s
    )
    left = Counter(step.op.chunk for step in steps if isinstance(step, Run) and step.op.kind == "B")
    rank = _Rank(chunks, grid, channels, dtype=dtype, training=bool(left))
    completed: int | None = None  # a chunk whose last backward is done and not yet announced
    with torch.set_grad_enabled(bool(left)):
        for step in steps:
            if isinstance(step, Recv):
                channels.post(step.message, rank.shape_of(step.message))
                continue
            if isinstance(step, Send):
                channels.send(step.message, rank.made.pop(step.message))
                continue
            if completed is not None and on_backward_done is not None:
                on_backward_done(completed)
            completed = None
            if step.op.kind == "F":
                rank.forward(step)
                moved()
                continue
            left[step.op.chunk] -= 1
            is_last = left[step.op.chunk] == 0
            rank.backward(step, before=before_last_backward if is_last else None)
            moved()
            completed = step.op.chunk if is_last else None
        if completed is not None and on_backward_done is not None:
            on_backward_done(completed)
    channels.finish()
    assert not rank.kept, "a table with backwards has one for each forward"
    return [rank.losses[microbatch] for microbatch in sorted(rank.losses)]


class _Rank:
    """The tensors of one rank during one step: made and not yet handed on, kept for backwards, losses."""

    def __init__(
        self, chunks: Sequence[Chunk], grid: Grid, channels: Channels, *, dtype: torch.dtype, training: bool
    ) -> None:
        self._chunks, self._grid, self._channels, self._dtype, self._training = chunks, grid, channels, dtype, training
        self.made: dict[Message, Tensor] = {}
        self.kept: dict[tuple[int, int], _Kept] = {}  # (chunk, micro-batch) -> from its forward to its backward
        self.losses: dict[int, Tensor] = {}

    def shape_of(self, message: Message) -> tuple[int, ...]:
        """The shape of a tensor that will be received: from the configuration, never from the wire."""
        chunk = message.stage // self._grid.pp.size
        if message.kind == "activation":
            return self._chunks[chunk].boundary_shape(message.microbatch)
        return self.kept[chunk, message.microbatch].output_shape

    def forward(self, step: Run) -> None:
        """Run a chunk forward and keep its graph."""
        chunk, microbatch = step.op.chunk, step.op.microbatch
        received = None
        if step.takes is not None:
            received = self._take(step.takes).detach().requires_grad_(self._training)
        output = self._chunks[chunk].forward(microbatch, received)
        if step.makes is None:
            self.losses[microbatch] = output.detach()
        else:
            if output.dtype != self._dtype:
                raise PipelineError(
                    f"pipeline chunk {chunk} on rank {self._grid.pp.rank} must give {self._dtype} for the next stage. "
                    f"Given: {output.dtype}.",
                    code="pipeline_boundary",
                )
            self.made[step.makes] = output.detach()
        if self._training:
            # The edge keeps the graph alone: the output's memory goes as soon as it is sent, unless the graph needs it.
            edge = get_gradient_edge(output) if output.requires_grad else None
            self.kept[chunk, microbatch] = _Kept(edge, tuple(output.shape), received)

    def backward(self, step: Run, *, before: Callable[[int], None] | None) -> None:
        """Run a chunk backward and let go of its graph."""
        chunk = step.op.chunk
        kept = self.kept.pop((chunk, step.op.microbatch))
        grad = self._take(step.takes) if step.takes is not None else None
        if before is not None:
            before(chunk)
        if kept.output is not None:
            torch.autograd.backward(kept.output, grad)
        if step.makes is None:
            return
        assert kept.received is not None, "only the first stage receives nothing, and makes no gradient"
        if kept.received.grad is None:
            raise PipelineError(
                f"pipeline chunk {chunk} on rank {self._grid.pp.rank} must use what it receives. "
                f"Given: no gradient for micro-batch {step.op.microbatch}.",
                code="pipeline_boundary",
            )
        self.made[step.makes] = kept.received.grad

    def _take(self, message: Message) -> Tensor:
        """What this rank made itself (p = 1), or what arrives."""
        return self.made.pop(message) if message.dst == message.src else self._channels.take(message)
