"""
Plans from the leader to every rank, outputs from the sampling rank back, on two gloo groups of their own.

The leader never waits for a rank that is busy: sends are started and looked after later. Every plan, ticks included,
is answered by an output, so both directions move at least once a second and a silent peer is a dead or hung one.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from trilithon_parallel.collectives import CollectiveError, Pending, irecv, isend
from trilithon_parallel.grid import Axis, Grid
from trilithon_server.engine.plan import (
    HEADER_WORDS,
    StepOutput,
    StepPlan,
    decode_output,
    decode_plan,
    digest,
    encode_output,
    encode_plan,
)


class PlanMismatch(RuntimeError):
    """A rank received a plan or an output that is not the one that was sent, or not in its turn: a bug."""


class Channel:
    """
    One rank's ends of both directions. Made by all ranks at the same point: it creates process groups.

    Args:
        grid: where this rank stands; the leader is global rank 0.
        timeout_s: how long a message may take before the peer counts as lost.
    """

    def __init__(self, grid: Grid, *, timeout_s: float) -> None:
        self._grid = grid
        self.sampling_rank = grid.last_stage_rank
        self._plans = _axis(grid, "plans", timeout_s)
        self._outputs = _axis(grid, "outputs", timeout_s)
        self._sent: deque[list[Pending]] = deque()
        self._expected = 0

    def send_plan(self, plan: StepPlan, *, max_pending: int) -> None:
        """Start sending a plan to every other rank. Sends of more than `max_pending` plans ago are waited for."""
        header, payload = (torch.from_numpy(array) for array in encode_plan(plan))
        pending = []
        for rank in range(1, self._grid.world_size):
            pending.append(isend(header, self._plans, dst=rank, label=f"plan {plan.number} header"))
            pending.append(isend(payload, self._plans, dst=rank, label=f"plan {plan.number}"))
        self._sent.append(pending)
        while len(self._sent) > max_pending:
            for send in self._sent.popleft():
                send.wait()

    def receive_plan(self) -> StepPlan:
        """Wait for the next plan (on every rank but the leader)."""
        number, payload = _receive(self._plans, src=0, label="plan")
        if number != self._expected:
            raise PlanMismatch(f"rank {self._grid.rank} expected plan {self._expected}. Given: plan {number}.")
        self._expected += 1
        return decode_plan(number, payload)

    def send_output(self, output: StepOutput) -> None:
        """Answer a plan (on the sampling rank, when that is not the leader)."""
        header, payload = (torch.from_numpy(array) for array in encode_output(output))
        self._sent.append(
            [
                isend(header, self._outputs, dst=0, label=f"output {output.number} header"),
                isend(payload, self._outputs, dst=0, label=f"output {output.number}"),
            ]
        )
        # The leader always has a receive waiting, so what was sent two outputs ago has long left.
        while len(self._sent) > 2:
            for send in self._sent.popleft():
                send.wait()

    def receive_output(self) -> StepOutput:
        """Wait for the next output (on the leader)."""
        number, payload = _receive(self._outputs, src=self.sampling_rank, label="output")
        return decode_output(number, payload)

    def flush(self) -> None:
        """Wait until everything has left."""
        while self._sent:
            for send in self._sent.popleft():
                send.wait()


class OutputInbox:
    """
    The leader's thread that waits for outputs, so that the stepping thread can wait for sockets and outputs alike.

    `wake_fd` becomes readable whenever something has arrived.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._arrived: queue.SimpleQueue[StepOutput | BaseException] = queue.SimpleQueue()
        self.wake_fd, self._write_fd = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(self._write_fd, False)
        self._thread = threading.Thread(target=self._run, name="outputs", daemon=True)
        self._thread.start()

    def take(self) -> list[StepOutput]:
        """
        Everything that has arrived.

        Raises:
            CollectiveError: the sampling rank is gone.
        """
        outputs = []
        while True:
            try:
                os.read(self.wake_fd, 4096)
            except BlockingIOError:
                break
        while not self._arrived.empty():
            item = self._arrived.get()
            if isinstance(item, BaseException):
                raise item
            outputs.append(item)
        return outputs

    def _run(self) -> None:
        while True:
            try:
                self._arrived.put(self._channel.receive_output())
            except (CollectiveError, PlanMismatch) as error:
                self._arrived.put(error)
                os.write(self._write_fd, b"!")
                return
            # A full pipe holds wake-ups that nobody has read yet: one more would say nothing new.
            with contextlib.suppress(BlockingIOError):
                os.write(self._write_fd, b".")


def _axis(grid: Grid, name: str, timeout_s: float) -> Axis:
    """All ranks on a gloo group of their own, so that plans never queue behind activations."""
    ranks = tuple(range(grid.world_size))
    if grid.world_size == 1:
        return Axis(name, 0, 1, ranks)
    group = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc=name)
    return Axis(name, grid.rank, grid.world_size, ranks, group)


def _receive(axis: Axis, *, src: int, label: str) -> tuple[int, bytes]:
    header = torch.empty(HEADER_WORDS, dtype=torch.int64)
    irecv(header, axis, src=src, label=f"{label} header").wait()
    number, num_bytes, expected = header.tolist()
    payload = torch.empty(num_bytes, dtype=torch.uint8)
    irecv(payload, axis, src=src, label=f"{label} {number}").wait()
    data: bytes = np.asarray(payload).tobytes()
    if digest(data) != expected:
        raise PlanMismatch(f"{label} {number} arrived damaged: its digest is not the one that was sent.")
    return number, data
