"""
Task `mlm`: restore masked tokens (arXiv 1810.04805). Rows are `{"text"}`.

A text becomes windows `[CLS] ... [SEP]` of at most `data.max_tokens`. What is masked is drawn anew in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.errors import refuse
from trilithon_finetune.recipes.base import IGNORE, Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.causal_lm import KEYS, TEXT
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_finetune.recipes.texts import nothing_learned
from trilithon_parallel.data.objectives import MASKED_PERCENT, MaskedLM
from trilithon_parallel.tokenizer import Tokenizer

_PART_BITS = 20  # of a sample's id; the bits above it are the row's
_ROW_BITS = 33


class MlmOptions(Section):
    """Task `mlm` has no options."""


class MaskedTokens(Recipe):
    """The recipe of `mlm`."""

    task = "mlm"
    head: Head = "vocabulary"
    formats: tuple[str, ...] = (TEXT,)
    defaults = Defaults(lr_full=5e-5, batch_size=32, max_tokens=128, weight_decay=0.01)
    Options: type[Section] = MlmOptions
    best_metric: Best = ("valid_loss", "min")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By the key `text`."""
        return TEXT if "text" in row else None

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A text that is not empty."""
        check = RowCheck(row, file=file, line=line)
        check.keys(KEYS)
        check.text("text")
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """
        Windows of the text, not yet masked: the targets are all that could be.

        Raises:
            FinetuneError: `invalid_config`, the tokenizer has no [CLS], [SEP] or [MASK].
        """
        cls, sep, mask = (_special(context.tokenizer, piece) for piece in ("[CLS]", "[SEP]", "[MASK]"))
        pieces = context.tokenizer.encode(row["text"], add_special_tokens=False)
        stride = context.max_tokens - 2
        samples = []
        for part, start in enumerate(range(0, len(pieces), stride)):
            window = pieces[start : start + stride]
            targets = tuple(IGNORE if token in (cls, sep, mask) else token for token in window)
            candidates = sum(target != IGNORE for target in targets)
            if not candidates:
                continue
            columns = {"supervised": _num_masked(candidates), "mask": mask, "vocab": context.tokenizer.vocab_size}
            tokens = (cls, *window, sep)
            samples.append(Sample(tokens, (IGNORE, *targets, IGNORE), columns=columns, row=line, part=part))
        return samples or [nothing_learned(context, file=file, line=line, path="text")]

    def dress(self, sample: Sample, *, seed: int, epoch: int) -> Sample:
        """The sample with 15% of its tokens masked; the rule is that of pretraining."""
        tokens = np.asarray(sample.tokens, np.int64)
        rule = MaskedLM(sample.columns["vocab"], int(tokens[0]), int(tokens[-1]), sample.columns["mask"])
        sample_id = (epoch << _ROW_BITS | sample.row) << _PART_BITS | sample.part
        masked = rule.build(tokens[1:-1], (), sample_id=sample_id, seed=seed)
        targets = np.where(masked.loss_mask, masked.targets, IGNORE)
        return replace(sample, tokens=tuple(masked.tokens.tolist()), targets=tuple(targets.tolist()))

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """
        `loss_per_byte`: nats for each byte of the masked text, which vocabularies can be compared by; the loss of a
        token can't, since a coarser vocabulary guesses longer tokens.
        """
        lost = -sum(float(output.values[0]) for output in outputs)
        masked = (target for output in outputs for target in output.sample.targets if target != IGNORE)
        num_bytes = sum(len(context.tokenizer.token_bytes(target)) for target in masked)
        return {"loss_per_byte": lost / num_bytes} if num_bytes else {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """Nothing: it is served as any encoder."""
        return {}


def _num_masked(candidates: int) -> int:
    """How many of so many tokens `MaskedLM` masks."""
    return min(candidates, max(1, (candidates * MASKED_PERCENT + 50) // 100))


def _special(tokenizer: Tokenizer, piece: str) -> int:
    for token in tokenizer.special_ids:
        if tokenizer.id_to_piece(token) == piece:
            return token
    raise refuse(
        "invalid_config",
        f"task mlm needs a tokenizer with the special token {piece}, which the model's has not.",
        param="model",
        hint="Choose a model of the BERT family.",
    )
