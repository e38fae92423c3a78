"""
What ranks are told and what comes back, as flat arrays of bytes: no pickle, the same plan on every rank.

A message is a header of three int64 (number, payload bytes, digest) and a payload: int64 numbers, then raw bytes.
T = tokens of the step, B = its sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from trilithon_parallel.models.seq2seq_serving import Sources
from trilithon_server.engine.adapters import Action, Command, Report
from trilithon_server.engine.logprobs import TokenInfo
from trilithon_server.engine.sampler import Draw, Drawn, Fork
from trilithon_server.engine.wire_pb2 import Pooling, Submit

HEADER_WORDS = 3


class Kind(IntEnum):
    """What a plan asks for: a forward pass, a sign of life, or the end."""

    STEP = 0
    TICK = 1
    STOP = 2


@dataclass(slots=True)
class Score:
    """Score prompt tokens: rows of batch entry `entry` at positions [first, last) of the sequence."""

    entry: int
    sequence_id: int
    first: int
    last: int


@dataclass(slots=True)
class Encoding:
    """Encode a source: its tokens, and the blocks that its keys and values go to."""

    tokens: list[int]
    blocks: list[int]


@dataclass(slots=True)
class StepPlan:
    """
    One step. Lists have one entry a sequence but for `tokens`, `types` and `positions`, which have one a token.

    `draws[i].row` is the entry whose last token's logits are drawn from. `starts` are tokens in the cache already;
    `tables` the blocks of each sequence; `types` and `positions` are empty where all are zero, or count from the start
    of their sequence; `pools` set for encoders; `reads` for encoder-decoders, whose `encodings`, any number of them,
    are made before anything is read. `slots` are those of the sequences' adapters, -1 for none; empty where
    none has any. `adapters` is carried out first. `deadline_s`: a rank that takes longer is hung.
    """

    number: int
    kind: Kind = Kind.STEP
    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    pools: list[Pooling] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    reads: list[Sources] = field(default_factory=list)
    registrations: list[tuple[int, Submit]] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    adapters: list[Command] = field(default_factory=list)
    deadline_s: float = 0.0


@dataclass(slots=True)
class StepOutput:
    """
    What a step found: per draw, per score (None: broken logits), per pooled sequence the fp32
    values of its vector or of its task head's logits.

    `busy_s` is the sampling rank's time but for waiting on the stage before it, `model_s` the part of it in the model.
    """

    number: int
    drawn: list[Drawn] = field(default_factory=list)
    scores: list[list[TokenInfo] | None] = field(default_factory=list)
    vectors: list[bytes] = field(default_factory=list)
    adapters: list[Report] = field(default_factory=list)
    busy_s: float = 0.0
    model_s: float = 0.0


class _Writer:
    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._bytes: list[bytes] = []

    def put(self, *numbers: int) -> None:
        self._numbers.extend(numbers)

    def put_list(self, numbers: list[int]) -> None:
        self._numbers.append(len(numbers))
        self._numbers.extend(numbers)

    def put_bytes(self, data: bytes) -> None:
        self._numbers.append(len(data))
        self._bytes.append(data)

    def finish(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        numbers = np.array([len(self._numbers), *self._numbers], dtype=np.int64).tobytes()
        payload = numbers + b"".join(self._bytes)
        header = np.array([number, len(payload), digest(payload)], dtype=np.int64)
        return header, np.frombuffer(bytearray(payload), dtype=np.uint8)


class _Reader:
    def __init__(self, payload: bytes) -> None:
        count = int.from_bytes(payload[:8], "little")
        self._numbers: Iterator[int] = iter(np.frombuffer(payload, np.int64, count, 8).tolist())
        self._payload, self._at = payload, 8 * (count + 1)

    def get(self) -> int:
        return next(self._numbers)

    def get_list(self) -> list[int]:
        return [next(self._numbers) for _ in range(self.get())]

    def get_bytes(self) -> bytes:
        begin, self._at = self._at, self._at + self.get()
        return self._payload[begin : self._at]

    def get_floats(self) -> list[float]:
        values: list[float] = np.frombuffer(self.get_bytes(), np.float64).tolist()
        return values


def digest(payload: bytes) -> int:
    """63 bits of a hash of a payload: a rank that reads another plan than was sent stops at once."""
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little") >> 1


def _lists(plan: StepPlan) -> tuple[list[int], ...]:
    return plan.tokens, plan.starts, plan.lengths, plan.types, plan.positions, plan.forgotten, plan.slots


def encode_plan(plan: StepPlan) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Header and payload of a plan."""
    out = _Writer()
    out.put(plan.kind, round(plan.deadline_s * 1e6))
    for numbers in _lists(plan):
        out.put_list(numbers)
    out.put_list([number for copy in plan.copies for number in copy])
    out.put_list([number for fork in plan.forks for number in (fork.sequence_id, fork.parent_id, fork.token)])
    for table in plan.tables:
        out.put_list(table)
    out.put(len(plan.draws))
    for draw in plan.draws:
        out.put(draw.row, draw.sequence_id)
        out.put_bytes(draw.mask or b"")
    out.put(len(plan.scores))
    for score in plan.scores:
        out.put(score.entry, score.sequence_id, score.first, score.last)
    out.put(len(plan.pools))
    for pool in plan.pools:
        out.put_bytes(pool.SerializeToString())
    out.put(len(plan.encodings))
    for encoding in plan.encodings:
        out.put_list(encoding.tokens)
        out.put_list(encoding.blocks)
    out.put(len(plan.reads))
    for read in plan.reads:
        out.put_list(read.lengths)
        out.put_list(read.blocks)
        out.put_bytes(np.array(read.biases, dtype=np.float64).tobytes())
    out.put(len(plan.registrations))
    for first_id, submit in plan.registrations:
        out.put(first_id)
        out.put_bytes(submit.SerializeToString())
    out.put(len(plan.adapters))
    for command in plan.adapters:
        out.put(command.action, command.slot)
        out.put_bytes(command.digest.encode())
        out.put_bytes(command.directory.encode())
    return out.finish(plan.number)


def decode_plan(number: int, payload: bytes) -> StepPlan:
    """The plan that `encode_plan` was given."""
    source = _Reader(payload)
    plan = StepPlan(number, Kind(source.get()), deadline_s=source.get() * 1e-6)
    for numbers in _lists(plan):
        numbers += source.get_list()
    copies = source.get_list()
    plan.copies = list(zip(copies[::2], copies[1::2], strict=True))
    forks = source.get_list()
    plan.forks = [Fork(*numbers) for numbers in zip(forks[::3], forks[1::3], forks[2::3], strict=True)]
    plan.tables = [source.get_list() for _ in plan.starts]
    for _ in range(source.get()):
        row, sequence_id, mask = source.get(), source.get(), source.get_bytes()
        plan.draws.append(Draw(row, sequence_id, mask or None))
    plan.scores = [Score(source.get(), source.get(), source.get(), source.get()) for _ in range(source.get())]
    plan.pools = [Pooling.FromString(source.get_bytes()) for _ in range(source.get())]
    plan.encodings = [Encoding(source.get_list(), source.get_list()) for _ in range(source.get())]
    plan.reads = [Sources(source.get_list(), source.get_list(), source.get_floats()) for _ in range(source.get())]
    for _ in range(source.get()):
        first_id = source.get()
        plan.registrations.append((first_id, Submit.FromString(source.get_bytes())))
    for _ in range(source.get()):
        action, slot = Action(source.get()), source.get()
        plan.adapters.append(Command(action, slot, source.get_bytes().decode(), source.get_bytes().decode()))
    return plan


def encode_output(output: StepOutput) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Header and payload of a step's output."""
    out = _Writer()
    out.put(round(output.busy_s * 1e9), round(output.model_s * 1e9), len(output.drawn))
    for drawn in output.drawn:
        out.put(drawn.token)
        _put_infos(out, [] if drawn.info is None else [drawn.info])
        _put_infos(out, [info for _, info in drawn.candidates])
        out.put_bytes(np.array([gain for gain, _ in drawn.candidates], dtype=np.float64).tobytes())
    out.put(len(output.scores))
    for infos in output.scores:
        out.put(infos is not None)
        _put_infos(out, infos or [])
    out.put(len(output.vectors))
    for vector in output.vectors:
        out.put_bytes(vector)
    out.put(len(output.adapters))
    for report in output.adapters:
        out.put(report.action, report.slot)
        out.put_bytes(report.code.encode())
        out.put_bytes(report.message.encode())
    return out.finish(output.number)


def decode_output(number: int, payload: bytes) -> StepOutput:
    """The output that `encode_output` was given."""
    source = _Reader(payload)
    output = StepOutput(number, busy_s=source.get() * 1e-9, model_s=source.get() * 1e-9)
    for _ in range(source.get()):
        token, infos, beam = source.get(), _get_infos(source), _get_infos(source)
        candidates = tuple(zip(source.get_floats(), beam, strict=True))
        output.drawn.append(Drawn(token, infos[0] if infos else None, candidates))
    for _ in range(source.get()):
        is_sound, infos = source.get(), _get_infos(source)
        output.scores.append(infos if is_sound else None)
    output.vectors = [source.get_bytes() for _ in range(source.get())]
    for _ in range(source.get()):
        action, slot = Action(source.get()), source.get()
        output.adapters.append(Report(action, slot, source.get_bytes().decode(), source.get_bytes().decode()))
    return output


def _put_infos(out: _Writer, infos: list[TokenInfo]) -> None:
    out.put(len(infos))
    logprobs: list[float] = []
    for info in infos:
        out.put(info.id, info.rank, len(info.top))
        logprobs.append(info.logprob)
        for token, logprob, rank in info.top:
            out.put(token, rank)
            logprobs.append(logprob)
    out.put_bytes(np.array(logprobs, dtype=np.float64).tobytes())


def _get_infos(source: _Reader) -> list[TokenInfo]:
    shapes = [
        (source.get(), source.get(), [(source.get(), source.get()) for _ in range(source.get())])
        for _ in range(source.get())
    ]
    logprobs = iter(source.get_floats())
    return [
        TokenInfo(token, next(logprobs), rank, tuple((other, next(logprobs), place) for other, place in top))
        for token, rank, top in shapes
    ]
