"""
Pipeline schedules as data: pure functions from sizes to op tables. No torch.

A table says, rank by rank and in order, which forward (F) or backward (B) of which micro-batch runs through which of
the rank's model chunks. Stage k of the model is chunk k // pp on rank k % pp. GPipe is that of arXiv 1811.06965; 1F1B
and interleaved 1F1B are those of arXiv 2104.04473, section 2.2. `with_messages` is a second pass that says where
tensors are sent and received; `simulate.py` checks and times any table, `pipeline.py` runs any table.

Letters: p pipeline ranks, v chunks per rank, m micro-batches, r a pipeline rank, g micro-batches per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B"]


class ScheduleError(ValueError):
    """
    Sizes that no schedule can have, or a table that cannot run.

    `code` is schedule_invalid (sizes, name), schedule_incomplete, schedule_deadlock or schedule_mispaired.
    """

    def __init__(self, message: str, *, code: str = "schedule_invalid", hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Op:
    """One forward (F) or backward (B) of one micro-batch through one chunk of a rank."""

    kind: Kind
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}.{self.chunk}"


@dataclass(frozen=True, slots=True)
class Message:
    """
    A tensor on its way to `stage`: the activation that its forward needs, or the gradient that its backward needs.

    `src` and `dst` are pipeline ranks.
    """

    kind: Literal["activation", "gradient"]
    stage: int
    microbatch: int
    src: int
    dst: int

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.microbatch} for stage {self.stage}"


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending; what is sent was made by an op before."""

    message: Message


@dataclass(frozen=True, slots=True)
class Recv:
    """Start receiving; an op after needs it."""

    message: Message


@dataclass(frozen=True, slots=True)
class Run:
    """Do `op` with the tensor `takes` (None where it begins with its own), which gives `makes` (None where it ends)."""

    op: Op
    takes: Message | None
    makes: Message | None


Step = Run | Send | Recv


@dataclass(frozen=True)
class Schedule:
    """A table of ops: `ranks[r]` is what pipeline rank r does, in order."""

    name: str
    pp: int
    virtual: int
    num_microbatches: int
    ranks: tuple[tuple[Op, ...], ...]

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline, pp * virtual."""
        return self.pp * self.virtual

    @property
    def has_backward(self) -> bool:
        """False for forward-only tables."""
        return any(op.kind == "B" for op in self.ranks[0])

    def message_into(self, rank: int, op: Op) -> Message | None:
        """What `op` on `rank` needs from another stage; None where the pipeline begins or the gradient is its own."""
        stage = op.chunk * self.pp + rank
        if op.kind == "F":
            return Message("activation", stage, op.microbatch, (stage - 1) % self.pp, rank) if stage else None
        if stage == self.num_stages - 1:
            return None
        return Message("gradient", stage, op.microbatch, (stage + 1) % self.pp, rank)

    def message_from(self, rank: int, op: Op) -> Message | None:
        """What `op` on `rank` makes for another stage; None where the pipeline ends."""
        stage = op.chunk * self.pp + rank
        if op.kind == "B":
            return Message("gradient", stage - 1, op.microbatch, rank, (stage - 1) % self.pp) if stage else None
        if stage == self.num_stages - 1:
            return None
        return Message("activation", stage + 1, op.microbatch, rank, (stage + 1) % self.pp)


@dataclass(frozen=True, slots=True)
class Span:
    """When one op runs, in whole units of time."""

    op: Op
    start: int
    end: int


def schedule(name: str, pp: int, virtual: int, num_microbatches: int) -> Schedule:
    """
    The table of a schedule by its name: gpipe, 1f1b, interleaved or forward_only.

    >>> [str(op) for op in schedule("1f1b", 2, 1, 2).ranks[0]]
    ['F0.0', 'F1.0', 'B0.0', 'B1.0']

    Args:
        name: a key of `SCHEDULES`.
        pp: pipeline ranks, at least 1.
        virtual: model chunks per rank, at least 1; at least 2 for interleaved, 1 for 1f1b.
        num_microbatches: per pipeline and step, at least 1; any number, for every schedule.
    Raises:
        ScheduleError: schedule_invalid.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"schedule must be one of {', '.join(SCHEDULES)}. Given: {name!r}.")
    return SCHEDULES[name](pp, virtual, num_microbatches)


def gpipe(pp: int, virtual: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards; with several chunks, chunk by chunk. Keeps m * v activations."""
    _check_sizes(pp, virtual, num_microbatches)
    forward, backward = _walks(virtual, num_microbatches, num_microbatches)
    return Schedule("gpipe", pp, virtual, num_microbatches, ((*forward, *backward),) * pp)


def one_f_one_b(pp: int, virtual: int, num_microbatches: int) -> Schedule:
    """1F1B: min(p - r - 1, m) forwards, then a forward and a backward in turn, then the other backwards."""
    _check_sizes(pp, virtual, num_microbatches)
    if virtual != 1:
        raise ScheduleError(
            f"schedule 1f1b runs one chunk per rank. Given: virtual = {virtual}.", hint="Use interleaved, or virtual 1."
        )
    forward, backward = _walks(1, num_microbatches, num_microbatches)
    ranks = tuple(_in_turn(forward, backward, warmup=pp - r - 1) for r in range(pp))
    return Schedule("1f1b", pp, 1, num_microbatches, ranks)


def interleaved(pp: int, virtual: int, num_microbatches: int, *, group: int | None = None) -> Schedule:
    """
    Interleaved 1F1B: groups of micro-batches go through all chunks of a rank before the next group enters.

    Args:
        group: micro-batches per group; by default `group_size`, which equals p where p divides m, as in the paper. A
            last group that is shorter than p makes tables that deadlock: `simulate` says so.
    """
    _check_sizes(pp, virtual, num_microbatches)
    if virtual < 2:
        raise ScheduleError(
            f"schedule interleaved needs 2 or more chunks per rank. Given: virtual = {virtual}.", hint="Use 1f1b."
        )
    size = group_size(pp, num_microbatches) if group is None else group
    forward, backward = _walks(virtual, num_microbatches, size)
    ranks = tuple(
        _in_turn(forward, backward, warmup=(pp - r - 1) * 2 + (virtual - 1) * min(size, num_microbatches))
        for r in range(pp)
    )
    return Schedule("interleaved", pp, virtual, num_microbatches, ranks)


def forward_only(pp: int, virtual: int, num_microbatches: int) -> Schedule:
    """The forwards of the other tables, for evaluation; nothing is kept."""
    _check_sizes(pp, virtual, num_microbatches)
    forward, _ = _walks(virtual, num_microbatches, group_size(pp, num_microbatches))
    return Schedule("forward_only", pp, virtual, num_microbatches, (tuple(forward),) * pp)


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "forward_only": forward_only,
}


def group_size(pp: int, num_microbatches: int) -> int:
    """
    Micro-batches per group of the interleaved table: the least g >= p that leaves no short last group.

    >>> group_size(4, 8), group_size(4, 9), group_size(2, 5), group_size(8, 3)
    (4, 5, 3, 3)
    """
    if num_microbatches < pp:
        return num_microbatches
    return next(g for g in range(pp, num_microbatches + 1) if is_legal_group(pp, num_microbatches, g))


def is_legal_group(pp: int, num_microbatches: int, group: int) -> bool:
    """True when groups of this size leave no last group shorter than p, so that the interleaved table can run."""
    if num_microbatches < pp:
        return group == num_microbatches
    return pp <= group <= num_microbatches and not 0 < num_microbatches % group < pp


def with_messages(table: Schedule) -> tuple[tuple[Step, ...], ...]:
    """
    The table with sends and receives, rank by rank: all that an executor needs to know.

    All messages stand in one global order, that in which they are made when a forward takes 1 and a backward 2, and
    every rank starts its own messages in that order: so no rank waits for another that waits for it, even where
    messages in both directions share one channel in which each holds up the next (NCCL with two ranks). A receive
    stands before the op during which the tensor is made, so that it travels meanwhile.
    """
    keyed: list[list[tuple[int, int, int, Step]]] = [[] for _ in range(table.pp)]
    for rank, spans in enumerate(walk(table, forward=1, backward=2)):
        for span in spans:
            takes, makes = table.message_into(rank, span.op), table.message_from(rank, span.op)
            keyed[rank].append((span.end, 0, 0, Run(span.op, takes, makes)))
            if makes is not None and makes.dst != rank:  # to itself, where p is 1, a rank sends nothing
                # Ops of one rank never end together, so (end, source) names a message and breaks ties the same way
                # at both ends.
                keyed[rank].append((span.end, 1, rank, Send(makes)))
                keyed[makes.dst].append((span.end, 1, rank, Recv(makes)))
    return tuple(tuple(step for *_, step in sorted(steps, key=lambda step: step[:3])) for steps in keyed)


def walk(table: Schedule, *, forward: int, backward: int) -> list[list[Span]]:
    """
    When each op runs if every rank does its list in order and messages take no time.

    Args:
        forward, backward: how long one op of each kind takes, 1 or more.
    Raises:
        ScheduleError: schedule_deadlock, with what each rank waits for.
    """
    spans: list[list[Span]] = [[] for _ in range(table.pp)]
    ends: dict[tuple[Kind, int, int], int] = {}  # (kind, stage, micro-batch) -> when it is done
    moved = True
    while moved:
        moved = False
        for rank, ops in enumerate(table.ranks):
            free = spans[rank][-1].end if spans[rank] else 0
            while len(spans[rank]) < len(ops):
                op = ops[len(spans[rank])]
                needed = [ends.get(key) for key in _needs(table, rank, op)]
                if None in needed:
                    break
                start = max([free, *(end for end in needed if end is not None)])
                free = start + (forward if op.kind == "F" else backward)
                ends[op.kind, op.chunk * table.pp + rank, op.microbatch] = free
                spans[rank].append(Span(op, start, free))
                moved = True
    stuck = [rank for rank in range(table.pp) if len(spans[rank]) < len(table.ranks[rank])]
    if stuck:
        waits = ", ".join(f"rank {rank} before {table.ranks[rank][len(spans[rank])]}" for rank in stuck)
        raise ScheduleError(f"schedule {table.name} deadlocks: {waits}.", code="schedule_deadlock")
    return spans


def _needs(table: Schedule, rank: int, op: Op) -> Iterator[tuple[Kind, int, int]]:
    """The ops, by (kind, stage, micro-batch), that must be done before `op`."""
    stage = op.chunk * table.pp + rank
    if op.kind == "B":
        yield "F", stage, op.microbatch
        if stage < table.num_stages - 1:
            yield "B", stage + 1, op.microbatch
    elif stage:
        yield "F", stage - 1, op.microbatch


def _walks(virtual: int, num_microbatches: int, group: int) -> tuple[list[Op], list[Op]]:
    """All forwards in order, group by group through all chunks, and the backwards: the same with chunks reversed."""
    places = [
        (microbatch, chunk)
        for first in range(0, num_microbatches, group)
        for chunk in range(virtual)
        for microbatch in range(first, min(first + group, num_microbatches))
    ]
    forward = [Op("F", microbatch, chunk) for microbatch, chunk in places]
    return forward, [Op("B", microbatch, virtual - 1 - chunk) for microbatch, chunk in places]


def _in_turn(forward: list[Op], backward: list[Op], *, warmup: int) -> tuple[Op, ...]:
    """`warmup` forwards, then one forward and one backward in turn, then the other backwards."""
    warmup = min(warmup, len(forward))
    steady = [op for pair in zip(forward[warmup:], backward, strict=False) for op in pair]
    return (*forward[:warmup], *steady, *backward[len(forward) - warmup :])


def _check_sizes(pp: int, virtual: int, num_microbatches: int) -> None:
    sizes = {"pp": pp, "virtual": virtual, "num_microbatches": num_microbatches}
    for name, size in sizes.items():
        if size < 1:
            raise ScheduleError(f"schedule {name} must be 1 or more. Given: {size}.")
