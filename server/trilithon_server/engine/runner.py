"""One rank's part of a step: copy blocks, run the stage, hand on or sample. T = tokens, H = hidden, R = rows."""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.attention import BLOCK_SIZE, AttentionView, PackedView, PagedBatch, PagedKVCache, PagedView
from trilithon_parallel.collectives import Pending, isend, recv
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import CausalStage, EncoderStage, Seq2SeqStage
from trilithon_server.engine.adapter_reads import AdapterReads
from trilithon_server.engine.logprobs import TokenInfo
from trilithon_server.engine.plan import Score, StepOutput, StepPlan
from trilithon_server.engine.sampler import Draw, Sampler
from trilithon_server.engine.wire_pb2 import Pooling

Places = npt.NDArray[np.int64]

# Rows of logits made at once when a prompt is scored: bounds their memory (rows x vocabulary x 4 bytes).
SCORE_ROWS = 32


class Runner:
    """
    Executes plans on this rank's stage. The sampling rank also turns logits into tokens.

    Args:
        stage: loaded and prepared.
        cache: this stage's KV cache; None for encoders.
        adapters: this stage's slots for adapters; None where the engine serves none.
    """

    def __init__(
        self,
        stage: CausalStage | EncoderStage | Seq2SeqStage,
        *,
        grid: Grid,
        cache: PagedKVCache | None,
        adapters: AdapterReads | None = None,
    ) -> None:
        self._stage = stage
        self._grid = grid
        self.cache = cache
        self._adapters = adapters
        self._samples = grid.is_last_stage and grid.tp.rank == 0
        self._sampler = Sampler()
        self._sent: deque[Pending] = deque()

    def execute(self, plan: StepPlan) -> StepOutput | None:
        """
        Run a plan; the output on the sampling rank, None on the others.

        Raises:
            CollectiveError: a peer is gone.
        """
        began = time.perf_counter()
        if self._samples:
            for first_id, submit in plan.registrations:
                self._sampler.register(first_id, submit)
            self._sampler.fork(plan.forks)
        output = StepOutput(plan.number)
        if self._adapters is not None:
            output.adapters = self._adapters.run(plan.adapters)
        waited = 0.0
        if plan.tokens or plan.encodings:
            with torch.inference_mode():
                waited = self._forward(plan, output)
        if self._samples:
            self._sampler.forget(plan.forgotten)
        output.busy_s = time.perf_counter() - began - waited
        return output if self._samples else None

    def _forward(self, plan: StepPlan, output: StepOutput) -> float:
        """The forward pass; returns the seconds spent waiting for the stage before."""
        device = self._grid.device
        bounds, places = spans_of(plan)
        view = self._view(plan, bounds, places)
        positions_T = torch.tensor(plan.positions) if plan.positions else torch.from_numpy(places)
        positions_T = positions_T.to(device)
        waited = 0.0
        if self._grid.is_first_stage:
            x = torch.tensor(plan.tokens, dtype=torch.int64, device=device)
        else:
            x = torch.empty(len(plan.tokens), self._stage.config.hidden_size, dtype=self._stage.dtype, device=device)
            began = time.perf_counter()
            recv(x, self._grid.pp, src=self._grid.prev_rank, label=f"activations of plan {plan.number}")
            waited = time.perf_counter() - began
        began = time.perf_counter()
        types_T = torch.tensor(plan.types, dtype=torch.int64, device=device) if plan.types else None
        adapters = self._adapters
        with nullcontext() if adapters is None or not plan.slots else adapters.bank.batch(plan.slots, bounds):
            hidden_TH = self._stage(x, positions_T=positions_T, view=view, types_T=types_T)
        output.model_s = time.perf_counter() - began
        if not self._grid.is_last_stage:
            self._hand_on(hidden_TH, plan.number)
        elif isinstance(self._stage, EncoderStage):
            if self._samples:
                began = time.perf_counter()
                output.vectors = pool(self._stage, hidden_TH, bounds, plan.pools)
                output.model_s += time.perf_counter() - began
        else:
            self._sample(hidden_TH, bounds, plan, output)
        return waited

    def _view(self, plan: StepPlan, bounds: list[int], places: Places) -> AttentionView:
        """Keys and values of a step; `places` [T] are those of its tokens in their own sequences."""
        if self.cache is None:
            return PackedView(bounds, causal=False)
        for source, target in plan.copies:
            self.cache.copy_block(source, target)
        batch = PagedBatch(bounds, plan.starts, plan.tables, slots_of(plan, bounds, places))
        return PagedView(self.cache, batch, batch_invariant=self._stage.backend.batch_invariant)

    def _hand_on(self, hidden_TH: Tensor, number: int) -> None:
        label = f"activations of plan {number}"
        self._sent.append(isend(hidden_TH, self._grid.pp, dst=self._grid.next_rank, label=label))
        while len(self._sent) > self._grid.pp.size:
            self._sent.popleft().wait()

    def flush(self) -> None:
        """Wait until the next stage has everything; a send that is dropped before that is never delivered by gloo."""
        while self._sent:
            self._sent.popleft().wait()

    def _sample(self, hidden_TH: Tensor, bounds: list[int], plan: StepPlan, output: StepOutput) -> None:
        """Logits are made on every rank of the tp axis (they gather), tokens on its first."""
        assert isinstance(self._stage, CausalStage | Seq2SeqStage)
        for score in plan.scores:
            infos = self._score(hidden_TH, bounds[score.entry] - plan.starts[score.entry], score)
            output.scores.append(infos)
        if not plan.draws:
            return
        entries = sorted({draw.row for draw in plan.draws})
        if len(entries) == hidden_TH.shape[0]:
            hidden_RH = hidden_TH
        else:
            last_R = torch.tensor([bounds[entry + 1] - 1 for entry in entries], device=hidden_TH.device)
            hidden_RH = hidden_TH.index_select(0, last_R)
        began = time.perf_counter()
        logits_RV = self._stage.gather_logits(hidden_RH)
        output.model_s += time.perf_counter() - began
        if self._samples:
            place = {entry: row for row, entry in enumerate(entries)}
            draws = [Draw(place[draw.row], draw.sequence_id, draw.mask) for draw in plan.draws]
            output.drawn = self._sampler.draw(logits_RV, draws)

    def _score(self, hidden_TH: Tensor, offset: int, score: Score) -> list[TokenInfo] | None:
        assert isinstance(self._stage, CausalStage | Seq2SeqStage)
        infos: list[TokenInfo] = []
        is_sound = True
        for first in range(score.first, score.last, SCORE_ROWS):
            last = min(first + SCORE_ROWS, score.last)
            logits_RV = self._stage.gather_logits(hidden_TH[offset + first : offset + last])
            if self._samples and is_sound:
                part = self._sampler.score(logits_RV, score.sequence_id, first=first)
                is_sound = part is not None
                infos += part or []
        return infos if is_sound else None


def try_head(stage: CausalStage | Seq2SeqStage, rows: int) -> None:
    """Logits of so many rows, on the last stage: what a start-up measures the memory of."""
    if stage.grid.is_last_stage:
        with torch.inference_mode():
            stage.gather_logits(
                torch.zeros(rows, stage.config.hidden_size, dtype=stage.dtype, device=stage.grid.device)
            )


def spans_of(plan: StepPlan) -> tuple[list[int], Places]:
    """The boundaries of a plan's sequences in T, and the place of each of its tokens in its own sequence."""
    bounds = [0, *np.cumsum(plan.lengths).tolist()]
    if len(plan.tokens) == len(plan.starts):  # decodes alone
        return bounds, np.array(plan.starts, dtype=np.int64)
    spans = zip(plan.starts, plan.lengths, strict=True)
    return bounds, np.concatenate([np.arange(at, at + n) for at, n in spans])


def slots_of(plan: StepPlan, bounds: list[int], places: Places) -> Tensor:
    """Where in the cache each of a plan's tokens goes: int64 [T]."""
    if len(plan.tokens) == len(plan.starts):
        pairs = zip(plan.tables, plan.starts, strict=True)
        slots = [table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for table, at in pairs]
        return torch.tensor(slots, dtype=torch.int64)
    parts = [
        np.array(table, dtype=np.int64)[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
        for table, where in zip(plan.tables, np.split(places, bounds[1:-1]), strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def pool(stage: EncoderStage, hidden_TH: Tensor, bounds: list[int], pools: list[Pooling]) -> list[bytes]:
    """
    What each sequence asked for, as fp32 values: the logits of the task head, row after row, or one vector: the mean of
    its tokens, its first or its last one, normalised if asked.

    Each sequence's head is computed on its own, so its numbers do not depend on the batch.
    """
    found = []
    for start, stop, how in zip(bounds, bounds[1:], pools, strict=False):
        part_SH = hidden_TH[start:stop]
        if how.task_logits:
            values = stage.task_logits(part_SH, [0, stop - start]).float()
        else:
            values = _vector(part_SH.float(), how)
        found.append(values.cpu().numpy().tobytes())
    return found


def _vector(part_SH: Tensor, how: Pooling) -> Tensor:
    if how.kind == Pooling.MEAN:
        vector_H = part_SH.mean(0)
    else:
        vector_H = part_SH[0] if how.kind == Pooling.FIRST else part_SH[-1]
    return F.normalize(vector_H, dim=-1) if how.normalize else vector_H
