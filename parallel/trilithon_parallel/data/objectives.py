"""
What a model learns from a window of tokens: the next token, masked tokens (BERT), corrupted spans (T5).

Pure functions of the window, the sample's id and the seed: all randomness is whole numbers from a generator seeded by
(seed, sample id), so a sample is the same on every rank of every layout, and new each time its window comes around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.samples import Windows

IGNORED = 0
"""The target where there is none; the loss mask is False there."""

MASKED_PERCENT = 15
"""Share of tokens that masked-LM and span corruption take away (arXiv 1810.04805, 1910.10683)."""

MEAN_SPAN = 3
"""Mean tokens of a corrupted span (arXiv 1910.10683, section 3.3.4)."""

_ALIGNMENT = 8  # decoder lengths are multiples of it, so that sequence parallelism can cut them

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Sample:
    """
    One sample, S tokens.

    Attributes:
        tokens, targets: i64[S].
        loss_mask: bool[S], True where the target counts.
        positions: i64[S].
        types: i64[S], token types, or None where the model has none.
        starts: where attention begins anew, rising, the first 0.
        encoder_tokens: i64[Se] of a sequence-to-sequence sample, else None.
    """

    tokens: Tokens
    targets: Tokens
    loss_mask: Mask
    positions: Tokens
    types: Tokens | None = None
    starts: tuple[int, ...] = (0,)
    encoder_tokens: Tokens | None = None


@dataclass(frozen=True)
class CausalLM:
    """
    Predict the next token.

    Attributes:
        reset_positions: count positions from 0 again in every document.
        reset_attention: a document does not attend to those before it in the window.
        mask_document_ends: the last token of a document (its EOD) predicts nothing: what follows is unrelated.
    """

    reset_positions: bool = False
    reset_attention: bool = False
    mask_document_ends: bool = False

    def windows(self, seq_len: int) -> Windows:
        """S + 1 tokens, of which the last is also the first of the next window."""
        return Windows(stride=seq_len, overlap=1)

    def build(self, window: Tokens, document_starts: Sequence[int], *, sample_id: int, seed: int) -> Sample:
        """
        Args:
            window: i64[S + 1].
            document_starts: where documents begin in it, rising, without 0.
            sample_id, seed: not used; nothing is random.
        """
        tokens, targets = window[:-1], window[1:]
        seq_len = len(tokens)
        starts = (0, *(start for start in document_starts if start < seq_len))
        loss_mask = np.ones(seq_len, np.bool_)
        if self.mask_document_ends:
            loss_mask[[start - 1 for start in document_starts]] = False
        positions = np.arange(seq_len, dtype=np.int64)
        if self.reset_positions:
            for start in starts[1:]:
                positions[start:] = np.arange(seq_len - start)
        return Sample(tokens, targets, loss_mask, positions, starts=starts if self.reset_attention else (0,))


@dataclass(frozen=True)
class MaskedLM:
    """
    Restore masked tokens: 15% of them, of which 80% become the mask, 10% a random token, 10% stay (arXiv 1810.04805).

    A sample is `[CLS] tokens [SEP]`, with `pairs` `[CLS] first [SEP] second [SEP]` with token types 0 and 1.

    Attributes:
        vocab_size: random tokens are below it.
        cls_id, sep_id, mask_id: of the tokenizer.
        pairs: cut the window in two at a random place.
        kept_ids: further tokens that are never masked, such as the end of a document.
    """

    vocab_size: int
    cls_id: int
    sep_id: int
    mask_id: int
    pairs: bool = False
    kept_ids: tuple[int, ...] = ()

    def windows(self, seq_len: int) -> Windows:
        """As many tokens as the special ones leave room for."""
        stride = seq_len - 2 - self.pairs
        if stride < 2:
            raise DataError(f"seq_len must be at least {4 + self.pairs} for masked tokens. Given: {seq_len}.")
        return Windows(stride=stride, overlap=0)

    def build(self, window: Tokens, document_starts: Sequence[int], *, sample_id: int, seed: int) -> Sample:
        """
        Args:
            window: i64[S - 2], or i64[S - 3] with pairs.
            document_starts: not used; documents are told apart by the separator that ends each.
            sample_id, seed: what the masking depends on.
        """
        random = generator(seed, sample_id)
        cls, sep = [self.cls_id], [self.sep_id]
        cut = 1 + random.randint(len(window) - 1) if self.pairs else len(window)
        parts = [cls, window[:cut], sep, *([window[cut:], sep] if self.pairs else [])]
        original = np.concatenate([np.asarray(part, np.int64) for part in parts])
        types = (np.arange(len(original)) >= cut + 2).astype(np.int64)
        candidates = np.flatnonzero(~np.isin(original, [self.cls_id, self.sep_id, self.mask_id, *self.kept_ids]))
        count = (len(candidates) * MASKED_PERCENT + 50) // 100
        count = min(len(candidates), max(1, count))
        chosen = np.sort(candidates[random.permutation(len(candidates))[:count]])
        fate = random.randint(0, 10, count)
        drawn = random.randint(0, self.vocab_size, count)
        tokens = original.copy()
        tokens[chosen] = np.where(fate < 8, self.mask_id, np.where(fate == 8, drawn, original[chosen]))
        loss_mask = np.zeros(len(original), np.bool_)
        loss_mask[chosen] = True
        targets = np.where(loss_mask, original, IGNORED)
        return Sample(tokens, targets, loss_mask, np.arange(len(original), dtype=np.int64), types=types)


@dataclass(frozen=True)
class SpanCorruption:
    """
    Restore removed spans: 15% of the tokens, in spans of 3 on average (arXiv 1910.10683).

    The encoder reads the rest, a sentinel in place of each span, and EOS; the decoder writes each sentinel and its
    span, and EOS. All samples of one length have as many spans, so encoder and decoder lengths are fixed.

    Attributes:
        sentinel_ids: `<extra_id_0>` and on, in this order.
        eos_id: ends both sides.
        pad_id: begins the decoder's input and fills it up to a multiple of 8 tokens, which do not count.
    """

    sentinel_ids: tuple[int, ...]
    eos_id: int
    pad_id: int

    def windows(self, seq_len: int) -> Windows:
        """As many tokens as make the encoder's side `seq_len` long."""
        stride = next((n for n in range(2, 2 * seq_len) if _encoder_len(n) == seq_len), 0)
        if not stride:
            raise DataError(f"seq_len must be at least {_encoder_len(2)} for corrupted spans. Given: {seq_len}.")
        if _spans(stride) > len(self.sentinel_ids):
            raise DataError(
                f"seq_len {seq_len} must have at most as many spans as there are sentinels. "
                f"Given: {_spans(stride)} spans, {len(self.sentinel_ids)} sentinels.",
                hint="Choose a shorter sequence, or a tokenizer with more sentinels.",
            )
        return Windows(stride=stride, overlap=0)

    def build(self, window: Tokens, document_starts: Sequence[int], *, sample_id: int, seed: int) -> Sample:
        """
        Args:
            window: i64 of the length that `windows` gives.
            document_starts: not used.
            sample_id, seed: what the spans depend on.
        """
        random = generator(seed, sample_id)
        num_spans, num_removed = _spans(len(window)), _removed(len(window))
        kept = _partition(random, len(window) - num_removed, num_spans)
        removed = _partition(random, num_removed, num_spans)
        encoder: list[NDArray[np.int64] | list[int]] = []
        decoder: list[NDArray[np.int64] | list[int]] = []
        at = 0
        for sentinel, num_kept, num_gone in zip(self.sentinel_ids, kept, removed, strict=False):
            encoder += [window[at : at + num_kept], [sentinel]]
            decoder += [[sentinel], window[at + num_kept : at + num_kept + num_gone]]
            at += num_kept + num_gone
        written = np.concatenate([*decoder, [self.eos_id]]).astype(np.int64)
        padding = np.full(-len(written) % _ALIGNMENT, self.pad_id, np.int64)
        tokens = np.concatenate([[self.pad_id], written[:-1], padding]).astype(np.int64)
        return Sample(
            tokens=tokens,
            targets=np.concatenate([written, np.full_like(padding, IGNORED)]),
            loss_mask=np.arange(len(tokens)) < len(written),
            positions=np.arange(len(tokens), dtype=np.int64),
            encoder_tokens=np.concatenate([*encoder, [self.eos_id]]).astype(np.int64),
        )


Objective = CausalLM | MaskedLM | SpanCorruption


def generator(seed: int, sample_id: int) -> np.random.RandomState:
    """Whole numbers for one sample, from numpy's frozen stream; the id may exceed 32 bits."""
    return np.random.RandomState([seed, sample_id & 0xFFFFFFFF, sample_id >> 32])


def _removed(num_tokens: int) -> int:
    """Tokens that are taken away: 15%, rounded, but at least one, and never all."""
    return min(max(1, (num_tokens * MASKED_PERCENT + 50) // 100), num_tokens - 1)


def _spans(num_tokens: int) -> int:
    """Spans that they make up: a third, rounded, at least one."""
    return max(1, (_removed(num_tokens) + MEAN_SPAN // 2) // MEAN_SPAN)


def _encoder_len(num_tokens: int) -> int:
    """Kept tokens, one sentinel per span, EOS. Grows by 0 or 1 with each token, so every length is met."""
    return num_tokens - _removed(num_tokens) + _spans(num_tokens) + 1


def _partition(random: np.random.RandomState, total: int, parts: int) -> list[int]:
    """`total` as a sum of so many whole numbers of at least 1, each such sum as likely."""
    cuts = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
    return [int(size) for size in np.diff([0, *cuts, total])]
