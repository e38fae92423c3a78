"""
Pipelines of toy stages against one process. Started by test_pipeline.py as one process per rank, never collected.

Every case runs on every rank, in the same order. A rank writes {case: "ok" or the error} to `<dir>/rank<N>.json`.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilithon_parallel import collectives, p2p, rendezvous
from trilithon_parallel.collectives import CollectiveError, copy_to_tp, recording, reduce_from_tp
from trilithon_parallel.grid import Grid
from trilithon_parallel.p2p import PipelineError
from trilithon_parallel.pipeline import run
from trilithon_parallel.schedule import Schedule, Send, Step, schedule, with_messages
from trilithon_parallel.simulate import simulate

HIDDEN = 16
ROWS = 6
FP32_TOLERANCE = 1e-5  # tensor parallelism sums in another order
FP64_TOLERANCE = 1e-12


class Stage(nn.Module):
    """x + W2 tanh(W1 x), W1 cut by columns and W2 by rows over tp; every rank knows all weights of a stage by seed."""

    def __init__(self, stage: int, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp = grid.tp
        generator = torch.Generator().manual_seed(1000 + stage)
        up, down = (torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64) / 4 for _ in range(2))
        self.up = nn.Parameter(up.to(dtype).chunk(grid.tp.size, dim=0)[grid.tp.rank].clone())
        self.down = nn.Parameter(down.to(dtype).chunk(grid.tp.size, dim=1)[grid.tp.rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(copy_to_tp(x, self.tp) @ self.up.T)
        return x + reduce_from_tp(inner @ self.down.T, self.tp)


class Marker:
    """Lives as long as one graph."""


class MarkGraph(torch.autograd.Function):
    """The identity, whose place in a graph keeps a marker alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marker: Marker) -> Tensor:
        ctx.marker = marker
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ToyChunk:
    """One stage of the toy model, with its inputs and its loss where it is the first or the last."""

    def __init__(
        self,
        stage: int,
        num_stages: int,
        grid: Grid,
        *,
        num_microbatches: int,
        dtype: torch.dtype,
        rows: int = ROWS,
        ragged: bool = True,
        live: set[int] | None = None,
    ) -> None:
        self.stage, self.num_stages, self.dtype, self.live = stage, num_stages, dtype, live
        self.module = Stage(stage, grid, dtype)
        last_rows = rows - 1 if ragged else rows  # the last micro-batch is smaller
        self.rows = [rows] * (num_microbatches - 1) + [last_rows]
        self.peak_live = 0
        self.outputs: list[weakref.ref[Tensor]] = []

    def inputs(self, microbatch: int) -> Tensor:
        generator = torch.Generator().manual_seed(microbatch)
        return torch.randn(self.rows[microbatch], HIDDEN, generator=generator, dtype=torch.float64).to(self.dtype)

    def boundary_shape(self, microbatch: int) -> tuple[int, ...]:
        return (self.rows[microbatch], HIDDEN)

    def forward(self, microbatch: int, received: Tensor | None) -> Tensor:
        assert (received is None) == (self.stage == 0)
        assert all(output() is None for output in self.outputs), "an output outlived its forward"
        x = self.module(self.inputs(microbatch) if received is None else received)
        if self.live is not None:
            marker = Marker()
            self.live.add(id(marker))
            weakref.finalize(marker, self.live.discard, id(marker))
            x = MarkGraph.apply(x, marker)  # type: ignore[no-untyped-call]  # torch's apply is untyped
            self.peak_live = max(self.peak_live, len(self.live))
        if self.stage == self.num_stages - 1:
            return (x * x).sum() / (100 * len(self.rows))
        self.outputs.append(weakref.ref(x))
        return x


def one_process(
    num_stages: int, *, num_microbatches: int, dtype: torch.dtype, **options: Any
) -> tuple[list[ToyChunk], list[Tensor]]:
    """The same stages one after the other in this process, micro-batch by micro-batch, and the losses."""
    make = partial(ToyChunk, num_microbatches=num_microbatches, dtype=dtype, **options)
    chunks = [make(stage, num_stages, Grid.single()) for stage in range(num_stages)]
    losses = []
    for microbatch in range(num_microbatches):
        x: Tensor | None = None
        for chunk in chunks:
            x = chunk.forward(microbatch, x)
            chunk.outputs.clear()
        assert x is not None
        x.backward()
        losses.append(x.detach())
    return chunks, losses


def pipeline(
    table: Schedule, grid: Grid, *, dtype: torch.dtype, ragged: bool = True, rows: int = ROWS, **options: Any
) -> tuple[list[ToyChunk], list[Tensor]]:
    """This rank's chunks after one step of the table, and the losses that it got."""
    live: set[int] = set()
    chunks = [
        ToyChunk(
            chunk * table.pp + grid.pp.rank,
            table.num_stages,
            grid,
            num_microbatches=table.num_microbatches,
            dtype=dtype,
            rows=rows,
            ragged=ragged,
            live=live,
        )
        for chunk in range(table.virtual)
    ]
    steps = options.pop("steps", None) or with_messages(table)[grid.pp.rank]
    losses = run(steps, chunks, grid, dtype=dtype, **({"scatter_gather": True, "timeout_s": 30} | options))
    assert not live, f"{len(live)} graphs outlived the step"
    return chunks, losses


@functools.cache
def grid_of(tp: int, pp: int) -> Grid:
    """Made at its first use, which every rank reaches at the same point."""
    return Grid.build(tp=tp, pp=pp)


def same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    if tolerance == 0:
        assert torch.equal(actual, expected), f"not bitwise equal, off by {float((actual - expected).abs().max()):.2e}"
    else:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_step(
    name: str,
    pp: int,
    virtual: int,
    num_microbatches: int,
    *,
    tp: int = 1,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 0.0,
    **options: Any,
) -> None:
    """Losses and gradients are those of one process; as many graphs as the simulator says were alive at once."""
    grid, table = grid_of(tp, pp), schedule(name, pp, virtual, num_microbatches)
    chunks, losses = pipeline(table, grid, dtype=dtype, **options)
    toy = {key: options[key] for key in ("rows", "ragged") if key in options}
    whole, expected = one_process(table.num_stages, num_microbatches=num_microbatches, dtype=dtype, **toy)
    if grid.is_last_stage:
        same(torch.stack(losses), torch.stack(expected), tolerance)
    else:
        assert losses == []
    for chunk in chunks:
        reference = whole[chunk.stage].module
        for (what, mine), theirs, dim in zip(
            chunk.module.named_parameters(), reference.parameters(), (0, 1), strict=True
        ):
            assert mine.grad is not None, what
            assert theirs.grad is not None, what
            same(mine.grad, theirs.grad.chunk(tp, dim=dim)[grid.tp.rank], tolerance)
    assert max(chunk.peak_live for chunk in chunks) == simulate(table).peak_activations[grid.pp.rank]


def check_forward_only(pp: int, virtual: int, num_microbatches: int) -> None:
    """Evaluation: the losses of one process, no graph, no gradient."""
    grid, table = grid_of(1, pp), schedule("forward_only", pp, virtual, num_microbatches)
    chunks, losses = pipeline(table, grid, dtype=torch.float32)
    _, expected = one_process(table.num_stages, num_microbatches=num_microbatches, dtype=torch.float32)
    if grid.is_last_stage:
        same(torch.stack(losses), torch.stack(expected), 0.0)
    assert all(parameter.grad is None for chunk in chunks for parameter in chunk.module.parameters())
    assert max(chunk.peak_live for chunk in chunks) <= 1


def check_hooks() -> None:
    """A chunk is announced before its last backward, and after it with complete gradients, the last chunk first."""
    grid, table = grid_of(1, 2), schedule("interleaved", 2, 2, 5)
    whole, _ = one_process(4, num_microbatches=5, dtype=torch.float32)
    chunks: list[ToyChunk] = []
    told: list[tuple[str, int, bool]] = []

    def tell(event: str) -> Callable[[int], None]:
        def hook(chunk: int) -> None:
            stage = chunk * 2 + grid.pp.rank
            grad, complete = chunks[chunk].module.up.grad, whole[stage].module.up.grad
            assert grad is not None
            assert complete is not None
            told.append((event, chunk, torch.equal(grad, complete)))

        return hook

    chunks += [
        ToyChunk(c * 2 + grid.pp.rank, 4, grid, num_microbatches=5, dtype=torch.float32) for c in range(table.virtual)
    ]
    run(
        with_messages(table)[grid.pp.rank],
        chunks,
        grid,
        dtype=torch.float32,
        scatter_gather=False,
        before_last_backward=tell("before"),
        on_backward_done=tell("after"),
    )

    assert told == [("before", 1, False), ("after", 1, True), ("before", 0, False), ("after", 0, True)]


def check_frozen_stages() -> None:
    """A first stage without trained parameters makes no graph; gradients pass through a frozen later stage."""
    grid, table = grid_of(1, 2), schedule("interleaved", 2, 2, 4)
    chunks = [ToyChunk(c * 2 + grid.pp.rank, 4, grid, num_microbatches=4, dtype=torch.float32) for c in range(2)]
    whole, _ = one_process(4, num_microbatches=4, dtype=torch.float32)
    for chunk in chunks:
        chunk.module.requires_grad_(chunk.stage in (1, 3))
    run(with_messages(table)[grid.pp.rank], chunks, grid, dtype=torch.float32, scatter_gather=False)

    for chunk in chunks:
        grad = chunk.module.up.grad
        if chunk.stage in (1, 3):
            assert grad is not None
            assert torch.equal(grad, whole[chunk.stage].module.up.grad)  # type: ignore[arg-type]  # it has one
        else:
            assert grad is None


def check_volumes(*, scatter_gather: bool, rows: int) -> None:
    """Per micro-batch and boundary b s h elements each way, with scatter/gather the tp-th part (rounded up)."""
    m, tp = 4, 2
    grid, table = grid_of(tp, 2), schedule("interleaved", 2, 2, m)
    with recording() as calls:
        pipeline(table, grid, dtype=torch.float32, ragged=False, rows=rows, scatter_gather=scatter_gather)
    whole = rows * HIDDEN
    each = -(-whole // tp) if scatter_gather else whole
    # Four stages in a row: rank 0 (stages 0 and 2) gives two activations and takes one, rank 1 the other way round.
    out, into = (2, 1) if grid.pp.rank == 0 else (1, 2)
    sent = {axis: [c.elements for c in calls if c.op == "send" and c.axis == axis] for axis in ("pp", "pp_back")}
    received = {axis: [c.elements for c in calls if c.op == "recv" and c.axis == axis] for axis in ("pp", "pp_back")}
    gathers = [c.elements for c in calls if c.op == "all_gather"]

    assert sent == {"pp": [each] * (out * m), "pp_back": [each] * (into * m)}
    assert received == {"pp": [each] * (into * m), "pp_back": [each] * (out * m)}
    assert gathers == ([each] * ((into + out) * m) if scatter_gather else [])


def check_sequence_parallel_boundary() -> None:
    """With sequence parallelism a boundary tensor is a share already: it is sent whole and not gathered."""
    from dataclasses import replace

    grid, table = replace(grid_of(2, 2), sequence_parallel=True), schedule("1f1b", 2, 1, 4)
    with recording() as calls:
        pipeline(table, grid, dtype=torch.float32, ragged=False)

    assert {c.elements for c in calls if c.op in ("send", "recv")} == {ROWS * HIDDEN}
    assert not [c for c in calls if c.op == "all_gather"]


def check_broken_contracts() -> None:
    """A chunk that gives another dtype, or ignores what it receives, is named; both found where no message is open."""
    grid = grid_of(1, 1)
    steps = with_messages(schedule("interleaved", 1, 2, 1))[0]

    def expect(chunks: Sequence[ToyChunk], message: str) -> None:
        try:
            run(steps, chunks, grid, dtype=torch.float32, scatter_gather=False)
        except PipelineError as error:
            said = f"{error.code}: {error}"
        else:
            said = "not refused"
        assert said.startswith("pipeline_boundary")
        assert message in said

    make = partial(ToyChunk, num_stages=2, grid=grid, num_microbatches=1)
    expect([make(0, dtype=torch.float64), make(1, dtype=torch.float32)], "must give torch.float32")
    deaf = make(1, dtype=torch.float32)
    deaf.forward = lambda microbatch, received: deaf.module.up.sum()  # type: ignore[method-assign]  # on purpose
    expect([make(0, dtype=torch.float32), deaf], "must use what it receives")


def swapped(steps: Sequence[Step]) -> list[Step]:
    """The steps with the first two sends of activations exchanged (after both were made)."""
    sends = [i for i, step in enumerate(steps) if isinstance(step, Send) and step.message.kind == "activation"]
    first, second = sends[:2]
    result = list(steps)
    result[second : second + 1] = [steps[second], steps[first]]
    del result[first]
    return result


def check_swap_is_harmless_on_gloo() -> None:
    """Tags name messages: sent in another order, each still reaches its op."""
    grid, table = grid_of(1, 2), schedule("gpipe", 2, 1, 4)
    steps = with_messages(table)[grid.pp.rank]
    _, losses = pipeline(table, grid, dtype=torch.float32, steps=swapped(steps) if grid.pp.rank == 0 else steps)
    _, expected = one_process(2, num_microbatches=4, dtype=torch.float32)
    if grid.is_last_stage:
        same(torch.stack(losses), torch.stack(expected), 0.0)


def check_order_alone(name: str, pp: int, virtual: int, num_microbatches: int) -> None:
    """
    Without tags, as on NCCL, messages pair by order on each channel, and all is well.

    Each channel is also made synchronous: a send waits until it has been received, before this rank goes on.
    """
    isend, irecv = collectives.isend, collectives.irecv

    def isend_in_order(x: Tensor, axis: Any, *, dst: int, label: str, tag: int) -> collectives.Pending:
        pending = isend(x, axis, dst=dst, label=label)
        pending.wait(30)
        return collectives.Pending(None, label, axis, x)

    def irecv_in_order(x: Tensor, axis: Any, *, src: int, label: str, tag: int) -> collectives.Pending:
        return irecv(x, axis, src=src, label=label)

    p2p.isend, p2p.irecv = isend_in_order, irecv_in_order  # type: ignore[assignment]
    try:
        check_step(name, pp, virtual, num_microbatches)
    finally:
        p2p.isend, p2p.irecv = isend, irecv


def check_peer(name: str, pp: int, virtual: int, num_microbatches: int) -> None:
    """torch.distributed.pipelining on the same stages, in f64: the same losses and gradients."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    grid, dtype = grid_of(1, pp), torch.float64
    table = schedule(name, pp, virtual, num_microbatches)
    chunks, losses = pipeline(table, grid, dtype=dtype, ragged=False)
    make = partial(ToyChunk, num_microbatches=num_microbatches, dtype=dtype, ragged=False)
    theirs = [make(chunk.stage, table.num_stages, grid) for chunk in chunks]
    example, trained = (torch.zeros(ROWS, HIDDEN, dtype=dtype, requires_grad=grad) for grad in (False, True))
    stages = [
        PipelineStage(
            chunk.module,
            chunk.stage,
            table.num_stages,
            torch.device("cpu"),
            input_args=(trained if chunk.stage else example,),
            output_args=(trained,),
            group=grid.pp.group,
        )
        for chunk in theirs
    ]
    peer = get_schedule_class({"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B"}[name])(
        stages if virtual > 1 else stages[0],
        num_microbatches,
        loss_fn=lambda x, target: (x * x).sum() / 100,  # the schedule divides by the number of micro-batches
        scale_grads=True,
    )
    inputs = torch.cat([theirs[0].inputs(microbatch) for microbatch in range(num_microbatches)])
    their_losses: list[Tensor] = []
    if grid.is_first_stage:
        peer.step(inputs)
    else:
        peer.step(target=torch.zeros_like(inputs), losses=their_losses)
    if grid.is_last_stage:
        same(torch.stack(losses) * num_microbatches, torch.stack(their_losses).detach(), FP64_TOLERANCE)
    for mine, other in zip(chunks, theirs, strict=True):
        for ours, peers in zip(mine.module.parameters(), other.module.parameters(), strict=True):
            assert ours.grad is not None
            assert peers.grad is not None
            same(ours.grad, peers.grad, FP64_TOLERANCE)


def _steps(sizes: Sequence[tuple[int, int, int]], **options: Any) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for pp, virtual, m in sizes:
        for name in ("gpipe", "1f1b", "interleaved"):
            if (name == "1f1b") == (virtual > 1) and name != "gpipe":
                continue
            found[f"{name}-p{pp}v{virtual}m{m}"] = partial(check_step, name, pp, virtual, m, **options)
    return found


def _tensor_parallel(name: str, pp: int, virtual: int, m: int, rows: int = ROWS) -> Callable[[], None]:
    return partial(check_step, name, pp, virtual, m, tp=2, rows=rows, tolerance=FP32_TOLERANCE)


CASES: dict[int, dict[str, Callable[[], None]]] = {
    1: {**_steps([(1, 1, 4), (1, 2, 4)]), "contracts": check_broken_contracts},
    2: {
        **_steps([(2, 1, 4), (2, 1, 1), (2, 2, 4), (2, 2, 5), (2, 2, 8), (2, 3, 6)]),
        "debug-p2v2m5": partial(check_step, "interleaved", 2, 2, 5, debug=True),
        "order-p2v2m4": partial(check_order_alone, "interleaved", 2, 2, 4),
        "order-p2v2m5": partial(check_order_alone, "interleaved", 2, 2, 5),
        "order-p2v3m6": partial(check_order_alone, "interleaved", 2, 3, 6),
        "forward-p2v1m4": partial(check_forward_only, 2, 1, 4),
        "forward-p2v2m5": partial(check_forward_only, 2, 2, 5),
        "hooks": check_hooks,
        "frozen": check_frozen_stages,
        "tags": check_swap_is_harmless_on_gloo,
        "peer-gpipe": partial(check_peer, "gpipe", 2, 1, 4),
        "peer-1f1b": partial(check_peer, "1f1b", 2, 1, 4),
        "peer-interleaved-p2v2": partial(check_peer, "interleaved", 2, 2, 4),
    },
    4: {
        **_steps([(4, 1, 8), (4, 1, 2), (4, 2, 8), (4, 2, 9)]),
        "order-p4v2m9": partial(check_order_alone, "interleaved", 4, 2, 9),
        "forward-p4v2m9": partial(check_forward_only, 4, 2, 9),
        "tp2-1f1b": _tensor_parallel("1f1b", 2, 1, 4),
        "tp2-interleaved": _tensor_parallel("interleaved", 2, 2, 5),
        "tp2-odd-rows": _tensor_parallel("interleaved", 2, 2, 4, rows=7),
        "volumes-plain": partial(check_volumes, scatter_gather=False, rows=ROWS),
        "volumes-scattered": partial(check_volumes, scatter_gather=True, rows=ROWS),
        "volumes-odd-rows": partial(check_volumes, scatter_gather=True, rows=7),
        "sequence-parallel": check_sequence_parallel_boundary,
        "peer-1f1b": partial(check_peer, "1f1b", 4, 1, 8),
        "peer-interleaved": partial(check_peer, "interleaved", 4, 2, 8),
    },
    8: {"tp2p4v2m9": _tensor_parallel("interleaved", 4, 2, 9), **_steps([(8, 2, 9)])},
}


def run_cases(work_dir: Path) -> None:
    """Join, run every case, write what happened."""
    world = rendezvous.join(timeout_s=60)
    results: dict[str, str] = {}
    for name, case in CASES[world.world_size].items():
        try:
            case()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
        (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


def run_swapped(work_dir: Path) -> None:
    """Two ranks in debug mode, of which one sends two activations in the wrong order; each writes how it ended."""
    world = rendezvous.join(timeout_s=60)
    table, grid = schedule("gpipe", 2, 1, 4), Grid.build(tp=1, pp=2)
    steps = with_messages(table)[grid.pp.rank]
    try:
        pipeline(table, grid, dtype=torch.float32, debug=True, steps=swapped(steps) if grid.pp.rank == 0 else steps)
        outcome = "finished"
    except (PipelineError, CollectiveError) as error:
        outcome = f"{type(error).__name__}: {error}"
    (work_dir / f"rank{world.rank}.json").write_text(json.dumps({"outcome": outcome}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"cases": run_cases, "swapped": run_swapped}[sys.argv[2]](Path(sys.argv[1]))
