"""
Encoders (BERT): tokens in, one vector a token out; a vector a text by pooling, logits of masked tokens or of labels.

Shapes: T packed tokens, H hidden, B sequences, R some of the tokens or sequences, L labels of a task head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.activations import activation
from trilithon_parallel.attention import AttentionView
from trilithon_parallel.backend import Backend
from trilithon_parallel.collectives import gather_tokens
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.dropout import Dropout
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import ColumnParallelLinear
from trilithon_parallel.models.head import HeadStage
from trilithon_parallel.models.joint_span import JointSpanHead
from trilithon_parallel.models.stage import Trunk


class Transform(nn.Module):
    """What BERT's masked-LM head does before the product with the vocabulary: norm(act(X W^T + b)), on every rank."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        size = {"in_features": config.hidden_size, "out_features": config.hidden_size}
        self.dense = nn.utils.skip_init(nn.Linear, **size, dtype=dtype, device=grid.device)  # type: ignore[no-untyped-call]  # torch's helper is untyped
        self.norm = backend.norm(config, grid=grid, dtype=dtype)
        self.activate = activation(config.activation, invariant=backend.batch_invariant)

    def forward(self, x_RH: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        result: Tensor = self.norm(self.activate(self.dense(x_RH)))
        return result


class Pooler(nn.Module):
    """BERT's pooler: tanh(x W^T + b) of each sequence's first token, on every rank."""

    def __init__(self, config: ModelConfig, *, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dense = ColumnParallelLinear(hidden, hidden, bias=True, dtype=dtype, device=grid.device)

    def forward(self, x_BH: Tensor) -> Tensor:
        """[B, H] -> [B, H]."""
        result: Tensor = self.dense(x_BH)
        return result.tanh()


class EncoderStage(HeadStage):
    """
    One rank's part of an encoder. Use it with `PackedView(cu_seqlens, causal=False)`.

    With a masked-LM head `logits` is there too, on the last stage: give it the hidden states of the masked tokens. With
    a task head `task_logits` is. A task head is small, so every tp rank has all of it: its columns aren't cut.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__(config, grid=grid, dtype=dtype)
        self.backend = backend
        self.model = Trunk(config, grid=grid, backend=backend, dtype=dtype)
        if config.mlm_head and grid.is_last_stage:
            self.lm_transform = Transform(config, grid=grid, backend=backend, dtype=dtype)
            self.add_head(self.model.embed_tokens if grid.is_first_stage else None, bias=True)
        if (head := config.task_head) is not None and grid.is_last_stage:
            if head.has_pooler:
                self.pooler = Pooler(config, grid=grid, dtype=dtype)
            self.task_head: nn.Module
            if head.kind == "joint_span":
                self.task_head = JointSpanHead(config, grid=grid, backend=backend, dtype=dtype)
            else:
                self.task_head = ColumnParallelLinear(
                    config.hidden_size, len(head.labels), bias=True, dtype=dtype, device=grid.device
                )

    def forward(self, x: Tensor, *, positions_T: Tensor, view: AttentionView, types_T: Tensor | None = None) -> Tensor:
        """
        Args:
            x: int64 tokens [T] on the first stage, hidden [T, H] on the others.
            positions_T: int64 [T]; `types_T`: int64 [T] token types, zeros where None.
        Returns:
            Hidden [T, H].
        """
        x_TH = self.model.embed(x, positions_T, types_T, view.dropout) if self.grid.is_first_stage else x
        return self.model.run(x_TH, positions_T, view)

    def head_input(self, hidden_RH: Tensor) -> Tensor:
        """The head's transformation [R, H] -> [R, H]."""
        result: Tensor = self.lm_transform(hidden_RH)
        return result

    def task_logits(self, hidden_TH: Tensor, cu_seqlens: Sequence[int], dropout: Dropout | None = None) -> Tensor:
        """
        Logits of the task head's labels, at least fp32, the same on every tp rank; on the last stage.

        Args:
            hidden_TH: what `forward` gave there.
            cu_seqlens: the B + 1 boundaries in T.
            dropout: of what the layer sees, while training; of a span's tokens nothing is dropped (as Devlin et al.).
        Returns:
            [B, L] of a `sequence` head; [T, L] of the others, T all tokens under sequence parallelism too.
        """
        head = self.config.task_head
        assert head is not None
        behind = len(self.model.layers)  # a place for dropout of its own: what follows the last layer
        if head.kind == "tokens" and dropout is not None:
            hidden_TH = dropout.hidden(hidden_TH, layer=behind, site="head")
        x_RH = gather_tokens(hidden_TH, self.grid)
        if head.has_pooler:
            x_RH = self.pooler(x_RH[torch.tensor(cu_seqlens[:-1], device=x_RH.device)])
            x_RH = x_RH if dropout is None else dropout.pooled(x_RH, layer=behind, site="head")
        logits_RL: Tensor
        if isinstance(self.task_head, JointSpanHead):
            logits_RL = self.task_head(x_RH, cu_seqlens)
        else:
            logits_RL = self.task_head(x_RH)
        return logits_RL if logits_RL.dtype == torch.float64 else logits_RL.float()

    def pool(self, hidden_TH: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """
        One vector a sequence [B, H], at least fp32: its tokens' mean or its first token, normalised if the model says
        so. The same on every tp rank.
        """
        x_TH = gather_tokens(hidden_TH, self.grid)
        x_TH = x_TH if x_TH.dtype == torch.float64 else x_TH.float()
        parts = [x_TH[start:stop] for start, stop in pairwise(cu_seqlens)]
        rows = [part.mean(0) if self.config.pooling == "mean" else part[0] for part in parts]
        pooled_BH = torch.stack(rows)
        return F.normalize(pooled_BH, dim=-1) if self.config.normalize else pooled_BH

    def prepare(self) -> None:
        """Pack every product for serving; the parameters are gone afterwards. A masked-LM head stays as it is."""
        self.model.prepare()
        if self.config.task_head is not None and self.grid.is_last_stage:
            head = self.task_head
            parts = head.products if isinstance(head, JointSpanHead) else [head]
            for part in (*parts, *([self.pooler.dense] if self.config.task_head.has_pooler else [])):
                part.product = self.backend.pack_columns([part])
