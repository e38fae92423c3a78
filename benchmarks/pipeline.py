"""
The pipeline bubble, measured: our executor with stages that only wait, real processes and real gloo messages.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --pp 4 --micro-batches 4 8 --forward-ms 50

A stage's forward sleeps, its backward sleeps twice as long; so eight ranks share two cores without hindering each
other, and what is measured is the order of the table, the messages and the executor itself. The bubble is the time of
a step over the time that a rank spends in its stages, less 1; the formula is (p - 1) / (v m) (arXiv 2104.04473). Of
several runs the fastest counts, because other work on the machine only ever adds. All tables of one p share one start
of its ranks and take turns. A message costs some tenths of a millisecond, more where others want the cores too: the
longer a stage waits, the less that matters. Leaves with 1 where a bubble is more than 10 % off, or interleaving gains
less than 10 % at m = p.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilithon_parallel import collectives, rendezvous
from trilithon_parallel.grid import Grid
from trilithon_parallel.pipeline import run
from trilithon_parallel.schedule import schedule, with_messages

ROWS, HIDDEN = 64, 256  # of the boundary tensor: 64 KiB, a message of a small model
TOLERANCE = 0.10
LIMIT_S = 1800


@dataclass(frozen=True)
class Case:
    """One table to time."""

    name: str
    pp: int
    virtual: int
    num_microbatches: int

    @property
    def formula(self) -> float:
        """The bubble that the paper gives."""
        return (self.pp - 1) / (self.virtual * self.num_microbatches)


class Clock:
    """Sleeps, and adds up how long."""

    def __init__(self) -> None:
        self.busy_s = 0.0

    def sleep(self, duration_s: float) -> None:
        start_s = time.monotonic()
        time.sleep(duration_s)
        self.busy_s += time.monotonic() - start_s


class _Wait(torch.autograd.Function):
    """The identity that takes its time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward_s: float) -> Tensor:
        ctx.clock, ctx.backward_s = clock, 2 * forward_s
        clock.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.sleep(ctx.backward_s)
        return grad, None, None


class WaitingChunk:
    """A chunk whose work is to wait."""

    def __init__(self, clock: Clock, forward_s: float, *, is_last: bool) -> None:
        self._clock, self._forward_s, self._is_last = clock, forward_s, is_last
        self._weight = torch.zeros(ROWS, HIDDEN, requires_grad=True)

    def forward(self, microbatch: int, received: Tensor | None) -> Tensor:
        """Wait."""
        result: Tensor = _Wait.apply(self._weight if received is None else received, self._clock, self._forward_s)  # type: ignore[no-untyped-call]  # torch's apply is untyped
        return result.sum() if self._is_last else result

    def boundary_shape(self, microbatch: int) -> tuple[int, ...]:
        """Every micro-batch has the same."""
        return (ROWS, HIDDEN)


def one_step(case: Case, grid: Grid, forward_s: float) -> tuple[float, float]:
    """Run a table once: the bubble, averaged over the ranks, and the seconds from the first start to the last end."""
    clock = Clock()
    steps = with_messages(schedule(case.name, case.pp, case.virtual, case.num_microbatches))[grid.pp.rank]
    chunks = [
        WaitingChunk(
            clock,
            forward_s / case.virtual,
            is_last=chunk == case.virtual - 1 and grid.is_last_stage,
        )
        for chunk in range(case.virtual)
    ]
    collectives.barrier(grid.world, label="start")
    start_s = time.monotonic()
    run(steps, chunks, grid, dtype=torch.float32, scatter_gather=False)
    end_s = time.monotonic()  # one clock for all processes of a host
    times = torch.tensor([[start_s, end_s, clock.busy_s]], dtype=torch.float64)
    starts, ends, busy = collectives.all_gather(times, grid.pp, dim=0, label="times").unbind(1)
    step_s = float(ends.max() - starts.min())
    return step_s / float(busy.mean()) - 1, step_s


def run_rank(cases: list[Case], *, forward_s: float, runs: int) -> None:
    """What each process of a start does; rank 0 prints the result for the parent."""
    torch.set_num_threads(1)
    rendezvous.join(timeout_s=60)
    grid = Grid.build(tp=1, pp=cases[0].pp)
    for case in cases:
        one_step(case, grid, 0.001)  # connections are made
    found: list[list[tuple[float, float]]] = [[] for _ in cases]
    for _ in range(runs):
        for measured, case in zip(found, cases, strict=True):
            measured.append(one_step(case, grid, forward_s))
    if grid.rank == 0:
        print(json.dumps([min(measured, key=lambda run: run[1]) for measured in found]))
    rendezvous.leave()


def start_ranks(pp: int, arguments: list[str]) -> list[tuple[float, float]]:
    """`pp` processes of this script on loopback; what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(pp), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else None,
        )
        for rank in range(pp)
    ]
    try:
        output, _ = processes[0].communicate(timeout=LIMIT_S)
        for process in processes:
            process.wait(30)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed; its own message stands above")
    return [(bubble, step_s) for bubble, step_s in json.loads(output)]


def cases_of(pp: int, args: argparse.Namespace) -> list[Case]:
    """The tables of one start: each m of the command line, and m = p."""
    sizes = sorted({pp, *args.micro_batches})
    return [*(Case("1f1b", pp, 1, m) for m in sizes), *(Case("interleaved", pp, args.virtual, m) for m in sizes)]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, nargs="+", default=[2, 4, 8], help="pipeline sizes [2 4 8]")
    parser.add_argument("--virtual", type=int, default=2, help="chunks per rank of the interleaved schedule [2]")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16], help="per step; m = p is added [8 16]")
    parser.add_argument("--forward-ms", type=float, default=500.0, help="of a micro-batch on one rank [500]")
    parser.add_argument("--runs", type=int, default=1, help="of each table; the fastest counts [1]")
    args = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(cases_of(args.pp[0], args), forward_s=args.forward_ms / 1000, runs=args.runs)
        return 0
    is_good = True
    print(f"{'schedule':<12} {'p':>2} {'v':>2} {'m':>3} {'formula':>8} {'measured':>9} {'ratio':>6} {'step':>8}")
    for pp in args.pp:
        cases = cases_of(pp, args)
        own = [f"--pp={pp}", f"--virtual={args.virtual}", f"--forward-ms={args.forward_ms}", f"--runs={args.runs}"]
        results = start_ranks(pp, [*own, "--micro-batches", *map(str, args.micro_batches)])
        step_of = {}
        for case, (bubble, step_s) in zip(cases, results, strict=True):
            ratio = bubble / case.formula
            is_close = abs(ratio - 1) <= TOLERANCE
            is_good &= is_close
            step_of[case.name, case.num_microbatches] = step_s
            print(
                f"{case.name:<12} {pp:>2} {case.virtual:>2} {case.num_microbatches:>3} {case.formula:>8.4f} "
                f"{bubble:>9.4f} {ratio:>6.3f} {step_s:>7.3f}s" + ("" if is_close else "  more than 10 % off"),
                flush=True,
            )
        gain = step_of["1f1b", pp] / step_of["interleaved", pp]
        is_good &= gain >= 1 + TOLERANCE
        print(f"  at m = p = {pp}, interleaved is {gain:.3f} times as fast as 1f1b", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
