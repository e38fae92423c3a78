"""What is learned from a window: next token, masked tokens, corrupted spans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.objectives import CausalLM, MaskedLM, Sample, SpanCorruption

CLS, SEP, MASK = 1, 2, 3
MASKED = MaskedLM(vocab_size=1000, cls_id=CLS, sep_id=SEP, mask_id=MASK)
SPANS = SpanCorruption(sentinel_ids=tuple(range(900, 1000)), eos_id=1, pad_id=0)


def window_of(size: int) -> np.ndarray:
    """Tokens that are all different, from 10 on."""
    return np.arange(10, 10 + size, dtype=np.int64)


def test_causal_by_default() -> None:
    """Targets are the next tokens; all count; positions and attention run through documents."""
    sample = CausalLM().build(window_of(9), [3, 8], sample_id=0, seed=0)

    assert sample.tokens.tolist() == list(range(10, 18))
    assert sample.targets.tolist() == list(range(11, 19))
    assert sample.loss_mask.all()
    assert sample.positions.tolist() == list(range(8))
    assert sample.starts == (0,)


def test_causal_with_document_ends() -> None:
    """
    Positions and attention begin anew at documents; the last token of a document predicts nothing.

    The document that begins at 8, the window's last target, has no token here, but the one before it ends at 7.
    Inverse seen: masking `start` instead of `start - 1`.
    """
    objective = CausalLM(reset_positions=True, reset_attention=True, mask_document_ends=True)
    sample = objective.build(window_of(9), [3, 8], sample_id=0, seed=0)

    assert sample.loss_mask.tolist() == [True, True, False, True, True, True, True, False]
    assert sample.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert sample.starts == (0, 3)


def _masked(num: int, *, pairs: bool = False, seed: int = 0, **options: object) -> list[Sample]:
    objective = MaskedLM(vocab_size=1000, cls_id=CLS, sep_id=SEP, mask_id=MASK, pairs=pairs, **options)  # type: ignore[arg-type]
    stride = objective.windows(128).stride
    return [objective.build(window_of(stride), [], sample_id=i, seed=seed) for i in range(num)]


def test_masked_shares() -> None:
    """15% of the tokens are predicted; of them 80% become the mask, 10% random, 10% stay; all else is as it was."""
    fates = {"mask": 0, "random": 0, "kept": 0}
    for sample in _masked(400):
        original = np.array([CLS, *window_of(126), SEP])
        chosen = sample.loss_mask
        assert chosen.sum() == 19  # 15% of 126, rounded
        assert np.array_equal(sample.tokens[~chosen], original[~chosen])
        assert np.array_equal(sample.targets[chosen], original[chosen])
        fates["mask"] += int((sample.tokens[chosen] == MASK).sum())
        fates["kept"] += int((sample.tokens[chosen] == original[chosen]).sum())
    total = 400 * 19
    fates["random"] = total - fates["mask"] - fates["kept"]

    # Three standard deviations of the counts.
    assert fates["mask"] == pytest.approx(0.8 * total, abs=3 * (0.16 * total) ** 0.5)
    assert fates["kept"] == pytest.approx(0.1 * total, abs=3 * (0.09 * total) ** 0.5 + 0.001 * total)
    assert fates["random"] == pytest.approx(0.1 * total, abs=3 * (0.09 * total) ** 0.5 + 0.001 * total)


def test_masked_golden() -> None:
    """One sample, number for number: a changed stream of random numbers would change every run."""
    sample = MASKED.build(window_of(38), [], sample_id=16, seed=1234)

    assert np.flatnonzero(sample.loss_mask).tolist() == [3, 9, 10, 15, 21, 34]
    assert sample.tokens[sample.loss_mask].tolist() == [MASK, MASK, MASK, 694, 30, MASK]


def test_masked_pairs() -> None:
    """`[CLS] a [SEP] b [SEP]` with token types 0 and 1, cut at every place sooner or later."""
    cuts = set()
    for sample in _masked(600, pairs=True):
        original = np.where(sample.loss_mask, sample.targets, sample.tokens)
        first, second = np.flatnonzero(original == SEP)
        cuts.add(int(first))
        assert original[0] == CLS
        assert second == 127
        assert sample.types is not None
        assert sample.types.tolist() == [0] * (first + 1) + [1] * (127 - first)
        assert original[(original != CLS) & (original != SEP)].tolist() == window_of(125).tolist()
    assert min(cuts) == 2
    assert max(cuts) == 125


def test_structure_is_never_masked() -> None:
    """Special tokens and those the user keeps are not predicted, even when a window holds nothing else."""
    objective = MaskedLM(vocab_size=1000, cls_id=CLS, sep_id=SEP, mask_id=MASK, kept_ids=(10, 11))
    window = np.array([10, 11, CLS, SEP, MASK, 10], np.int64)

    sample = objective.build(window, [], sample_id=0, seed=0)

    assert not sample.loss_mask.any()
    assert sample.tokens.tolist() == [CLS, *window, SEP]


@pytest.mark.parametrize("build", [MASKED, SPANS], ids=["masked", "spans"])
def test_samples_depend_on_seed_and_id_alone(build: MaskedLM | SpanCorruption) -> None:
    """The same id and seed give the same sample whenever it is asked for; another id, also beyond 32 bits, or seed
    another."""
    window = window_of(build.windows(64).stride)

    def tokens(sample_id: int, seed: int) -> list[int]:
        return build.build(window, [], sample_id=sample_id, seed=seed).tokens.tolist()

    assert tokens(3, 9) == tokens(3, 9)
    others = [tokens(4, 9), tokens(3, 10), tokens(3 + 2**32, 9), tokens(3, 9)]
    assert len({tuple(other) for other in others}) == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 512), st.integers(0, 2**40))
def test_spans_restore_the_window(seq_len: int, sample_id: int) -> None:
    """
    Putting each span in place of its sentinel gives the window back; lengths are fixed; 15% are removed.

    Inverse seen: a sentinel after its span, or the EOS left out of the decoder's side, breaks it.
    """
    stride = SPANS.windows(seq_len).stride
    sample = SPANS.build(window_of(stride), [], sample_id=sample_id, seed=11)
    assert sample.encoder_tokens is not None
    encoder, written = sample.encoder_tokens.tolist(), sample.targets[sample.loss_mask].tolist()

    assert len(encoder) == seq_len
    assert len(sample.tokens) % 8 == 0
    assert len(sample.tokens) - len(written) < 8
    assert encoder[-1] == written[-1] == SPANS.eos_id
    assert sample.tokens[: len(written)].tolist() == [SPANS.pad_id, *written[:-1]]
    spans: dict[int, list[int]] = {}
    for token in written[:-1]:
        if token in SPANS.sentinel_ids:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == list(SPANS.sentinel_ids[: len(spans)])
    assert all(spans.values())
    restored = [inner for token in encoder[:-1] for inner in spans.get(token, [token])]
    assert restored == window_of(stride).tolist()
    removed = sum(map(len, spans.values()))
    assert removed == max(1, (stride * 15 + 50) // 100)
    assert len(spans) == max(1, round(removed / 3))


def test_t5_lengths() -> None:
    """512 tokens on the encoder's side stand for 568 of text, with 114 to write: the published lengths of T5."""
    assert SPANS.windows(512).stride == 568
    sample = SPANS.build(window_of(568), [], sample_id=0, seed=0)

    assert int(sample.loss_mask.sum()) == 114
    assert len(sample.tokens) == 120


@pytest.mark.parametrize(
    ("seq_len", "build", "sentence"),
    [
        (3, MASKED, "seq_len must be at least 4 for masked tokens. Given: 3"),
        (2, SPANS, "seq_len must be at least 3 for corrupted spans. Given: 2"),
        (4096, SPANS, "must have at most as many spans as there are sentinels. Given: 228 spans, 100 sentinels"),
    ],
)
def test_R11_lengths_that_cannot_be_are_explained(
    seq_len: int, build: MaskedLM | SpanCorruption, sentence: str
) -> None:
    """Too short for the special tokens, too long for the sentinels."""
    with pytest.raises(DataError) as raised:
        build.windows(seq_len)

    assert sentence in raised.value.message
