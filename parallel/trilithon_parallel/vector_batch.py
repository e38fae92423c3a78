"""
A micro-batch of queries and passages, each a vector that is told apart from all others of the global batch, and how the
vectors of all ranks come together; see `contrast.py`.

Shapes: T packed tokens, B sequences, N of them in a global batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from trilithon_parallel.collectives import all_gather
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.contrast import Pool
from trilithon_parallel.contrast_terms import NOTHING, QUERY, Contrast
from trilithon_parallel.dropout import Dropout
from trilithon_parallel.grid import Grid
from trilithon_parallel.loss import Lost
from trilithon_parallel.models import EncoderStage, ReaderStage, TwinStage
from trilithon_parallel.objective import PackedBatch, Stage


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorBatch(PackedBatch):
    """
    Texts, each of which becomes a vector.

    `is_query_B`: which are read as queries, by an encoder of their own where there are two; on the CPU. `roles_B`,
    `pairs_B`, `keys_B`: int64, as in `contrast.Pool`. `contrast`: how answers are told from others. `trains_passages`:
    False: of two encoders that of passages is run as it is served, and is given no gradient. `pulls_BH`, with
    `losses_B`: the gradient of what the global batch loses to these vectors, and what these queries lose; None until
    the vectors of all ranks are known. Outputs: the vectors [B, H].
    """

    is_query_B: Sequence[bool]
    roles_B: Tensor
    pairs_B: Tensor
    keys_B: Tensor
    contrast: Contrast
    trains_passages: bool = True
    pulls_BH: Tensor | None = None
    losses_B: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Queries."""
        return int((self.roles_B == QUERY).sum())

    def run(self, stage: nn.Module, received: Tensor | None, *, dropout: Dropout | None) -> Tensor:
        """Through an encoder, or the one beside a reader, or two."""
        encoder = _encoder_of(stage)
        if not isinstance(encoder, TwinStage):
            return super().run(encoder, received, dropout=dropout)
        hidden_TH: Tensor | None = None
        for one, is_query in ((encoder.query, True), (encoder, False)):
            chosen = [i for i, queries in enumerate(self.is_query_B) if queries is is_query]
            if not chosen:
                continue
            part, tokens = self._only(chosen)
            learns = is_query or self.trains_passages
            drops = None
            if dropout is not None and learns:
                drops = replace(dropout, sample_ids=part.sample_ids, lengths=part.lengths)
            x = None if received is None else received[tokens]
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                part_RH = PackedBatch.run(part, one, x, dropout=drops)
            if hidden_TH is None:
                hidden_TH = part_RH.new_zeros(len(self.tokens_T), part_RH.shape[1])
            hidden_TH = hidden_TH.index_copy(0, tokens, part_RH)
        assert hidden_TH is not None
        return hidden_TH

    def _only(self, chosen: Sequence[int]) -> tuple[VectorBatch, Tensor]:
        """Some of the texts, and where their tokens stand among all: int64 [R]."""
        bounds, device = self.cu_seqlens, self.tokens_T.device
        tokens = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in chosen]).to(device)
        lengths = [self.lengths[i] for i in chosen]
        part = replace(
            self,
            tokens_T=self.tokens_T[tokens],
            positions_T=self.positions_T[tokens],
            types_T=None if self.types_T is None else self.types_T[tokens],
            cu_seqlens=[0, *accumulate(lengths)],
            sample_ids=[self.sample_ids[i] for i in chosen],
            lengths=lengths,
        )
        return part, tokens

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """What its queries lose, with the gradient that the whole global batch gives its vectors."""
        assert isinstance(stage, EncoderStage)
        assert self.pulls_BH is not None
        assert self.losses_B is not None
        pulled = (stage.pool(hidden_TH, self.cu_seqlens).double() * self.pulls_BH).sum()
        return Lost.as_a_whole((pulled - pulled.detach() + self.losses_B.sum()) * scale)

    def outputs(self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, per_token: bool) -> Tensor:
        """The vectors."""
        return _encoder_of(stage).pool(hidden_TH, self.cu_seqlens)

    def output_shape(self, config: ModelConfig, *, per_token: bool) -> tuple[int, ...]:
        """[B, H]."""
        return self.num_sequences, (config.retriever or config).hidden_size


def pooled(batches: Sequence[VectorBatch], vectors_BH: Tensor, grid: Grid) -> tuple[Pool, Tensor]:
    """
    The vectors of all dp rows, the same on every rank, and where this row's stand among them: -1 for what is nothing.

    Args:
        vectors_BH: fp64, of this row's batches, one behind the other.
    """
    ids = [index for batch in batches for index in batch.sample_ids]
    columns = [ids, *(torch.cat([getattr(batch, name) for batch in batches]) for name in _FACTS)]
    facts_B4 = torch.stack([torch.as_tensor(column, dtype=torch.int64).cpu() for column in columns], 1)
    counts = all_gather(torch.tensor([len(facts_B4)]), grid.dp, dim=0, label="contrast.counts")
    most = int(counts.max())
    every = [
        all_gather(_padded(x, most).to(grid.device), grid.dp, dim=0, label="contrast").cpu()
        for x in (facts_B4, vectors_BH)
    ]
    kept = torch.cat([torch.arange(most) < count for count in counts]) & (every[0][:, 1] != NOTHING)
    facts_N4, vectors_NH = (x[kept] for x in every)
    order = facts_N4[:, 0].argsort(stable=True)
    samples_N, *facts = facts_N4[order].unbind(1)
    places = torch.searchsorted(samples_N.contiguous(), facts_B4[:, 0].contiguous())
    return Pool(vectors_NH[order], *facts), torch.where(facts_B4[:, 1] != NOTHING, places, -1)


_FACTS = ("roles_B", "pairs_B", "keys_B")


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(rows - len(x), x.shape[1])))


def _encoder_of(stage: nn.Module) -> EncoderStage:
    if isinstance(stage, ReaderStage):
        assert stage.retriever is not None
        return stage.retriever
    assert isinstance(stage, EncoderStage)
    return stage
