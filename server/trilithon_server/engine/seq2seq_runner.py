"""
One rank's part of a step of an encoder-decoder: encode the sources of the plan, then decode. E = tokens of sources, T =
tokens of the decoder.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from trilithon_parallel.attention import BLOCK_SIZE, PagedBatch, PagedKVCache
from trilithon_parallel.collectives import recv
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import Seq2SeqStage
from trilithon_parallel.models.seq2seq import boundary_rows
from trilithon_parallel.models.seq2seq_serving import Seq2SeqBatch, Sources, serve
from trilithon_server.engine.plan import Encoding, StepOutput, StepPlan
from trilithon_server.engine.runner import Runner, slots_of, spans_of, try_head
from trilithon_server.engine.sampler import Draw
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Sampling, Submit


class Seq2SeqRunner(Runner):
    """Executes plans on this rank's stage of an encoder-decoder; `cache` is there on every stage."""

    def _forward(self, plan: StepPlan, output: StepOutput) -> float:
        assert isinstance(self._stage, Seq2SeqStage)
        assert self.cache is not None
        for source, target in plan.copies:
            self.cache.copy_block(source, target)
        bounds, places = spans_of(plan)
        batch = Seq2SeqBatch(
            encoder_lengths=[len(encoding.tokens) for encoding in plan.encodings],
            encoder_slots_E=_encoder_slots(plan.encodings),
            paged=PagedBatch(bounds, plan.starts, plan.tables, slots_of(plan, bounds, places)),
            sources=plan.reads,
        )
        device = self._grid.device
        began = time.perf_counter()
        x = self._receive(batch.num_encoder_tokens, len(plan.tokens), plan.number)
        waited = time.perf_counter() - began
        began = time.perf_counter()
        encoder_tokens = [token for encoding in plan.encodings for token in encoding.tokens]
        hidden = serve(
            self._stage,
            x,
            batch,
            self.cache,
            encoder_tokens_E=torch.tensor(encoder_tokens, dtype=torch.int64, device=device),
            decoder_tokens_T=torch.tensor(plan.tokens, dtype=torch.int64, device=device),
        )
        output.model_s = time.perf_counter() - began
        if self._grid.is_last_stage:
            if plan.tokens:
                self._sample(hidden, bounds, plan, output)
        elif len(hidden):
            self._hand_on(hidden, plan.number)
        return waited

    def _receive(self, num_encoder_tokens: int, num_decoder_tokens: int, number: int) -> Tensor | None:
        """What the stage before hands on; nothing is sent of no rows, and nothing comes to the first stage."""
        grid, config = self._grid, self._stage.config
        if grid.is_first_stage:
            return None
        rows = boundary_rows(
            config,
            pp=grid.pp.size,
            stage=grid.pp.rank - 1,
            num_encoder_tokens=num_encoder_tokens,
            num_decoder_tokens=num_decoder_tokens,
            counts=grid.layer_counts,
        )
        x = torch.empty(rows, config.hidden_size, dtype=self._stage.dtype, device=grid.device)
        return recv(x, grid.pp, src=grid.prev_rank, label=f"activations of plan {number}") if rows else x


def warm_up_seq2seq(
    spec: EngineSpec, config: ModelConfig, stage: Seq2SeqStage, *, grid: Grid, max_context: int, gather_tokens: int
) -> float:
    """
    The most that a plan can ask for; returns the seconds that it took.

    Sources up to the budget (or one window, which may be more), the decoder's tokens up to the budget and the window,
    and a decode that reads `gather_tokens` of sources.
    """
    began = time.monotonic()
    length = min(max_context, spec.max_batch_tokens)
    num_blocks = -(-max_context // BLOCK_SIZE)
    table = list(range(num_blocks))
    cache = PagedKVCache(config, grid, num_blocks=num_blocks, dtype=stage.dtype)
    runner = Seq2SeqRunner(stage, grid=grid, cache=cache)
    sampling = Sampling(num_sequences=1, repetition_penalty=1.0, top_p=1.0, typical_p=1.0, top_p_decay=1.0, logprobs=1)
    plan = StepPlan(0, tokens=[0] * length, starts=[0], lengths=[length], tables=[table], draws=[Draw(0, 0)])
    plan.registrations = [(0, Submit(prompt=[0], sampling=sampling))]
    plan.encodings = [Encoding([0] * max_context, table)] * max(1, spec.max_batch_tokens // max_context)
    plan.reads = [Sources([max_context], table)]
    runner.execute(plan)
    wide = StepPlan(1, tokens=[0], starts=[0], lengths=[1], tables=[[0]])
    wide.reads = [Sources([gather_tokens], [0] * -(-gather_tokens // BLOCK_SIZE))]
    runner.execute(wide)
    runner.flush()
    try_head(stage, spec.max_batch_sequences)
    return time.monotonic() - began


def _encoder_slots(encodings: list[Encoding]) -> Tensor:
    """Where in the cache each of the tokens to encode goes: int64 [E]."""
    slots = [
        encoding.blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        for encoding in encodings
        for place in range(len(encoding.tokens))
    ]
    return torch.tensor(slots, dtype=torch.int64)
