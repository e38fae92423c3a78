"""The same small encoders with task heads as `transformers` makes them, and what they say of our batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from trilithon_parallel.config import ModelConfig, TaskHead
from trilithon_parallel.objective import PackedBatch

CLASSES: dict[str, Any] = {
    "tokens": transformers.BertForTokenClassification,
    "sequence": transformers.BertForSequenceClassification,
    "span": transformers.BertForQuestionAnswering,
}


def hub_config_of(config: ModelConfig, head: TaskHead | None = None) -> Any:
    """transformers' configuration of one of our encoders, without dropout."""
    labels: dict[str, Any] = {} if head is None or head.kind == "span" else head.hub_fields()
    if labels:
        labels["id2label"] = {int(key): label for key, label in labels["id2label"].items()}
    return transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_size,
        max_position_embeddings=config.max_context,
        type_vocab_size=config.token_types,
        layer_norm_eps=config.norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **labels,
    )


def said_by(model: Any, batch: PackedBatch) -> Tensor:
    """The logits of transformers' model, sequence by sequence, packed as ours are."""
    assert batch.types_T is not None
    rows = []
    for start, stop in pairwise(batch.cu_seqlens):
        out = model(batch.tokens_T[None, start:stop], token_type_ids=batch.types_T[None, start:stop])
        rows.append(torch.stack((out.start_logits, out.end_logits), -1)[0] if "start_logits" in out else out.logits[0])
    return torch.stack(rows) if rows[0].dim() == 1 else torch.cat(rows)


def loss_of(model: Any, kind: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """
    transformers' own mean loss over sequences of `task_models.sequences`, padded.

    Of spans it knows no context: what may not be chosen is taken out of its logits before its own formula.
    """
    longest = max(len(row["tokens"]) for row in rows)

    def padded(key: str, fill: int = 0) -> Tensor:
        return torch.stack([F.pad(row[key], (0, longest - len(row[key])), value=fill) for row in rows])

    lengths = torch.tensor([len(row["tokens"]) for row in rows])
    is_real = torch.arange(longest) < lengths[:, None]
    given = {"input_ids": padded("tokens"), "token_type_ids": padded("types"), "attention_mask": is_real.long()}
    if kind == "tokens":
        labels = padded("targets").masked_fill(padded("weights") == 0, -100)
        loss: Tensor = model(**given, labels=labels).loss
    elif kind == "sequence":
        loss = model(**given, labels=torch.tensor([row["label"] for row in rows])).loss
    else:
        out = model(**given)
        is_allowed = padded("context").bool()
        is_allowed[:, 0] = True
        ends = (("start", out.start_logits), ("end", out.end_logits))
        loss = torch.stack(
            [
                F.cross_entropy(logits.masked_fill(~is_allowed, -torch.inf), torch.tensor([row[end] for row in rows]))
                for end, logits in ends
            ]
        ).mean()
    return loss
