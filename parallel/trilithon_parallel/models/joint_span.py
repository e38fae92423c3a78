"""
The joint span model of answers: one score for each span, from its first and its last token together.

    score(i, j) = w . gelu(W [h_i; h_j] + b),    i <= j < i + L

W is kept as the half that sees the first token and the half that sees the last one, so that each is a product of all
tokens, made once. The score has no bias: a softmax over spans would not see it.

Shapes: T packed tokens, H hidden, L lengths of spans.

Source: arXiv 2002.09599, section 2.1 (p(a|c) as a joint model of start and end).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trilithon_parallel.activations import activation
from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import ColumnParallelLinear


class JointSpanHead(nn.Module):
    """Scores of spans, on every tp rank whole."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        assert config.task_head is not None
        hidden, device = config.hidden_size, grid.device
        self.num_lengths = len(config.task_head.labels)
        self.first = ColumnParallelLinear(hidden, hidden, bias=True, dtype=dtype, device=device)
        self.last = ColumnParallelLinear(hidden, hidden, bias=False, dtype=dtype, device=device)
        self.score = ColumnParallelLinear(hidden, 1, bias=False, dtype=dtype, device=device)
        self.activate = activation("gelu", invariant=backend.batch_invariant)

    @property
    def products(self) -> list[ColumnParallelLinear]:
        """What a server packs."""
        return [self.first, self.last, self.score]

    def forward(self, x_TH: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """
        [T, H] -> [T, L]: of each token the spans of 1, 2 ... L tokens that begin with it.

        One that would leave its sequence has the score of one that ends with it, and stands for nothing: whoever reads
        scores knows which spans there are.
        """
        first_TH, last_TH = self.first(x_TH), self.last(x_TH)
        ends_T = torch.cat([torch.full((stop - start,), stop - 1) for start, stop in pairwise(cu_seqlens)])
        places_T, ends_T = torch.arange(len(ends_T), device=x_TH.device), ends_T.to(x_TH.device)
        # A length at a time: nobody who only reads ever holds [T, L, H].
        scores = []
        for further in range(self.num_lengths):
            chosen_TH = last_TH.index_select(0, torch.minimum(places_T + further, ends_T))
            scores.append(self.score(self.activate(first_TH + chosen_TH)))
        return torch.cat(scores, 1)
