"""
One simulator for every schedule table: is it right, how long does it take, what does it keep? No torch.

A rank does its list in order, messages take no time. Times are exact: forward and backward are those of a micro-batch
through all chunks of a rank, a chunk takes 1/v of them.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from trilithon_parallel.schedule import Message, Op, Recv, Run, Schedule, ScheduleError, Send, Span, Step, walk


@dataclass(frozen=True)
class Timeline:
    """
    A table with its times. `spans[r]` are the ops of rank r in whole units; `unit` is what one of them lasts.

    Source: bubble as a fraction of ideal time, arXiv 2104.04473, section 2.2.1.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    unit: Fraction

    @property
    def makespan(self) -> Fraction:
        """From the start of the first op to the end of the last."""
        return self.unit * max(spans[-1].end for spans in self.spans)

    @property
    def bubble(self) -> Fraction:
        """Idle time of a rank as a fraction of its work: (p - 1) / (v m) for 1F1B and interleaved, where m >= p."""
        ideal = self.unit * max(sum(span.end - span.start for span in spans) for spans in self.spans)
        return self.makespan / ideal - 1

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank, the most forwards of a chunk whose backward is not done. Without backwards nothing is kept."""
        return tuple(_peak(spans) for spans in self.spans) if self.schedule.has_backward else (0,) * len(self.spans)


def simulate(table: Schedule, *, forward: int | Fraction = 1, backward: int | Fraction = 2) -> Timeline:
    """
    Check a table and time it.

    Args:
        forward, backward: what a micro-batch takes on one rank, through all of its chunks; above 0.
    Raises:
        ScheduleError: schedule_incomplete, an op is missing, there twice, or does not belong; schedule_deadlock, ranks
            wait for each other; schedule_mispaired, a pair of ranks makes tensors in another order than it uses them.
    """
    if min(forward, backward) <= 0:
        raise ScheduleError(f"simulate forward and backward must be above 0. Given: {forward} and {backward}.")
    check_complete(table)
    costs = [Fraction(cost) / table.virtual for cost in (forward, backward)]
    unit = Fraction(math.gcd(*(c.numerator for c in costs)), math.lcm(*(c.denominator for c in costs)))
    in_units = [int(cost / unit) for cost in costs]
    spans = walk(table, forward=in_units[0], backward=in_units[1])
    check_order(table)
    return Timeline(table, tuple(map(tuple, spans)), unit)


def check_complete(table: Schedule) -> None:
    """Every forward, and every backward if there are any, stands once on its rank; or ScheduleError."""
    kinds: tuple[Any, ...] = ("F", "B") if table.has_backward else ("F",)
    places = [(m, c) for m in range(table.num_microbatches) for c in range(table.virtual)]
    expected = Counter(Op(kind, microbatch, chunk) for kind in kinds for microbatch, chunk in places)
    for rank, ops in enumerate(table.ranks):
        there = Counter(ops)
        if there != expected:
            wrong = ", ".join(map(str, sorted({*(there - expected), *(expected - there)}, key=str)))
            raise ScheduleError(
                f"schedule {table.name} rank {rank} must do every op once. Missing, twice or foreign: {wrong}.",
                code="schedule_incomplete",
            )


def check_order(table: Schedule, *, shared_channel: bool = False) -> None:
    """
    Each pair of ranks uses tensors in the order in which they are made; or ScheduleError.

    Activations and gradients travel apart, each first in, first out. `shared_channel` asks what would happen if both
    went one way: with two ranks and several chunks they would be mistaken for each other.
    """
    made: dict[tuple[int, int, str], list[Message]] = defaultdict(list)
    used: dict[tuple[int, int, str], list[Message]] = defaultdict(list)
    for rank, ops in enumerate(table.ranks):
        for op in ops:
            for message, into in ((table.message_from(rank, op), made), (table.message_into(rank, op), used)):
                if message is not None and message.src != message.dst:
                    channel: str = "both" if shared_channel else message.kind
                    into[message.src, message.dst, channel].append(message)
    for (src, dst, channel), messages in made.items():
        for sent, expected in zip(messages, used[src, dst, channel], strict=True):
            if sent != expected:
                raise ScheduleError(
                    f"schedule {table.name} mispairs messages from rank {src} to rank {dst}: "
                    f"the {sent} is made when the {expected} is expected.",
                    code="schedule_mispaired",
                )


def check_messages(tables: Sequence[Sequence[Step]]) -> None:
    """
    Tables with sends and receives run to their end even where both sides wait at every message; or ScheduleError.

    Raises:
        ScheduleError: schedule_mispaired, the k-th send of a directed pair and kind is not the k-th receive;
            schedule_deadlock.
    """
    sends: dict[tuple[int, int, str], list[Message]] = defaultdict(list)
    receives: dict[tuple[int, int, str], list[Message]] = defaultdict(list)
    for steps in tables:
        for step in steps:
            if not isinstance(step, Run):
                message = step.message
                into = sends if isinstance(step, Send) else receives
                into[message.src, message.dst, message.kind].append(message)
    for src, dst, kind in sorted({*sends, *receives}):
        if sends[src, dst, kind] != receives[src, dst, kind]:
            raise ScheduleError(
                f"schedule mispairs the {kind} messages from rank {src} to rank {dst}.", code="schedule_mispaired"
            )
    _meet(tables)


def _meet(tables: Sequence[Sequence[Step]]) -> None:
    """Run with blocking messages: a send and its receive end together, when both ranks stand before them."""
    at = [0] * len(tables)

    def now(rank: int) -> Step | None:
        return tables[rank][at[rank]] if at[rank] < len(tables[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(len(tables)):
            while (step := now(rank)) is not None:
                if isinstance(step, Send | Recv):
                    message = step.message
                    if now(message.src) != Send(message) or now(message.dst) != Recv(message):
                        break
                    at[message.src] += 1
                    at[message.dst] += 1
                else:
                    at[rank] += 1
                moved = True
    stuck = [f"rank {rank} at {step}" for rank in range(len(tables)) if (step := now(rank)) is not None]
    if stuck:
        raise ScheduleError(f"schedule deadlocks on its messages: {', '.join(stuck)}.", code="schedule_deadlock")


def picture(timeline: Timeline) -> str:
    """
    The timeline as text, one row per chunk.

    A forward is its micro-batch's number, then `-` as long as it lasts; a backward the number, then `=`. A dot is an
    idle rank; blank, the rank works on another chunk.

    >>> from trilithon_parallel.schedule import schedule
    >>> print(picture(simulate(schedule("1f1b", 2, 1, 3))))
    rank 0 chunk 0  01..0=21=.2=
    rank 1 chunk 0  .00=11=22=..
    """
    width = len(str(timeline.schedule.num_microbatches - 1))
    last = max(spans[-1].end for spans in timeline.spans)
    rank_width, chunk_width = len(str(len(timeline.spans) - 1)), len(str(timeline.schedule.virtual - 1))
    lines = []
    for rank, spans in enumerate(timeline.spans):
        idle = ["." * width] * last
        for span in spans:
            idle[span.start : span.end] = [" " * width] * (span.end - span.start)
        for chunk in range(timeline.schedule.virtual):
            cells = list(idle)
            for span in spans:
                if span.op.chunk == chunk:
                    fill = "-" if span.op.kind == "F" else "="
                    cells[span.start : span.end] = [fill * width] * (span.end - span.start)
                    cells[span.start] = str(span.op.microbatch).rjust(width)
            head = f"rank {rank:>{rank_width}}" if chunk == 0 else " " * (5 + rank_width)
            lines.append(f"{head} chunk {chunk:>{chunk_width}}  {''.join(cells)}".rstrip())
    return "\n".join(lines)


def chrome_trace(timeline: Timeline) -> str:
    """The timeline as JSON in the Chrome trace format (chrome://tracing, Perfetto); one unit of time is 1 ms."""
    microseconds = 1000 * timeline.unit
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in range(len(timeline.spans))
    ]
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            op = span.op
            events.append(
                {
                    "ph": "X",
                    "name": str(op),
                    "cat": "forward" if op.kind == "F" else "backward",
                    "pid": 0,
                    "tid": rank,
                    "ts": float(span.start * microseconds),
                    "dur": float((span.end - span.start) * microseconds),
                    "args": {
                        "microbatch": op.microbatch,
                        "chunk": op.chunk,
                        "stage": op.chunk * timeline.schedule.pp + rank,
                    },
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _peak(spans: Sequence[Span]) -> int:
    live = peak = 0
    for span in spans:
        live += 1 if span.op.kind == "F" else -1
        peak = max(peak, live)
    return peak
