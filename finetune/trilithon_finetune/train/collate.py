"""
From samples to a micro-batch on the device, of the kind that the task's head learns from.

Shapes: T packed tokens, B sequences, P pairs of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from trilithon_finetune.recipes.base import IGNORE, Head, Sample
from trilithon_parallel.contrast_terms import NOTHING, PLAIN, QUERY, Contrast
from trilithon_parallel.objective import (
    Batch,
    ClassBatch,
    JointSpanBatch,
    PackedBatch,
    PreferenceBatch,
    SpanBatch,
    TagBatch,
)
from trilithon_parallel.vector_batch import VectorBatch

PAIR_BITS = 24
"""Of a pair's number within its row."""


def pair_of(sample: Sample) -> int:
    """The number of a vector's pair among all rows."""
    return sample.row << PAIR_BITS | sample.columns["pair"]


def collate(
    samples: Sequence[Sample],
    ids: Sequence[int],
    *,
    head: Head,
    device: torch.device,
    counts: bool = True,
    references: Sequence[float] | None = None,
    beta: float = 0.1,
    contrast: Contrast = PLAIN,
    trains_passages: bool = True,
) -> PackedBatch:
    """
    Pack samples one after another.

    Args:
        samples: at least one; chosen and rejected answers in turn where `head` is `preference`.
        ids: of the samples, for their dropout masks.
        counts: False: the batch is there for company and nothing of it counts.
        references: of a preference, each sample's log-probability by the model that training began from.
        beta: of a preference. contrast, trains_passages: as of a `VectorBatch`.
    """
    lengths = [len(sample.tokens) for sample in samples]
    bounds = [0, *accumulate(lengths)]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    has_types = any(sample.types for sample in samples)
    packed = {
        "tokens_T": ints(list(chain.from_iterable(sample.tokens for sample in samples))),
        "positions_T": ints([at for sample in samples for at in (sample.positions or range(len(sample.tokens)))]),
        "cu_seqlens": bounds,
        "sample_ids": list(ids),
        "lengths": lengths,
        "types_T": ints([t for s in samples for t in (s.types or (0,) * len(s.tokens))]) if has_types else None,
    }
    if head == "sequence":
        labels = [sample.columns["label"] for sample in samples]
        weights_B = torch.full((len(samples),), float(counts), device=device)
        return ClassBatch(**packed, labels_B=ints(labels), weights_B=weights_B)  # type: ignore[arg-type]  # by name
    if head == "vectors":
        roles = [sample.columns["role"] if counts else NOTHING for sample in samples]
        pairs = [pair_of(sample) for sample in samples]
        facts = {
            "is_query_B": [sample.columns["role"] == QUERY for sample in samples],
            "roles_B": ints(roles),
            "pairs_B": ints(pairs),
            "keys_B": ints([sample.columns["key"] for sample in samples]),
        }
        how = {"contrast": contrast, "trains_passages": trains_passages}
        return VectorBatch(**packed, **facts, **how)  # type: ignore[arg-type]  # by name
    if head in ("span", "joint_span") and counts:
        context_T = torch.zeros(bounds[-1], dtype=torch.bool, device=device)
        for start, sample in zip(bounds, samples, strict=False):
            context_T[start + sample.columns["context_start"] : start + sample.columns["context_stop"]] = True
        places = [
            [start + s.columns[end] for start, s in zip(bounds, samples, strict=False)] for end in ("start", "end")
        ]
        kind = SpanBatch if head == "span" else JointSpanBatch
        return kind(**packed, starts_B=ints(places[0]), ends_B=ints(places[1]), context_T=context_T)  # type: ignore[arg-type]  # by name
    targets = [sample.targets or (IGNORE,) * len(sample.tokens) for sample in samples]
    targets_T = ints(list(chain.from_iterable(targets)))
    weights_T = ((targets_T != IGNORE) & counts).float()
    rest = {**packed, "targets_T": targets_T.clamp(min=0), "weights_T": weights_T}
    if head in ("tokens", "span", "joint_span"):  # of a span only what doesn't count
        return TagBatch(**rest)  # type: ignore[arg-type]  # by name
    if head == "preference" and counts and references is not None:
        pairs_P2 = torch.tensor(references, dtype=torch.float64, device=device).view(-1, 2)
        return PreferenceBatch(**rest, reference_P2=pairs_P2, beta=beta)  # type: ignore[arg-type]  # by name
    return Batch(**rest)  # type: ignore[arg-type]  # by name
