"""Answers proposed for a text: spans and their probabilities, draws, and the rule where there is no model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_bert

from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.tasks.answer_spans import RUN_WORDS, AnswerFormat, Candidates, capitals_and_numbers
from trilithon_server.tasks.pieces import WordPieces

TEXT = "The miller counted 12 sacks, then 144, and nobody came."


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> WordPieces:
    return WordPieces(load_tokenizer(tiny_bert(tmp_path_factory.mktemp("bert") / "m")))


def test_acc_E01_all_spans_of_all_windows_share_one_softmax(pieces: WordPieces) -> None:
    """
    Against every pair of tokens by hand: windows that overlap count a span once, none is too long, none leaves the
    text, and the probabilities add up to 1. Inverse seen red: [CLS] counted as context.
    """
    format_ = AnswerFormat(max_tokens=14, doc_stride=5, max_answer_tokens=3)
    windows = format_.encode(TEXT, pieces)
    draw = np.random.default_rng(1)
    logits = [draw.normal(size=(len(w.encoded.tokens), 3)).astype(np.float32) for w in windows]
    found = format_.decode(windows, logits)
    by_hand: dict[tuple[int, int], float] = {}
    for window, scores in zip(windows, logits, strict=True):
        tokens = window.encoded.tokens
        assert tokens[0] == pieces.cls_id
        assert tokens[-1] == pieces.sep_id
        for i in range(1, len(tokens) - 1):
            for j in range(i, min(i + 3, len(tokens) - 1)):
                span = window.starts[i - 1], window.ends[j - 1]
                by_hand[span] = max(float(scores[i, j - i]), by_hand.get(span, -np.inf))
    total = np.logaddexp.reduce(list(by_hand.values()))

    assert len(windows) > 1
    assert list(found.spans) == sorted(by_hand)
    assert abs(np.exp(found.logprobs).sum() - 1) <= 1e-6
    for span, logprob in zip(found.spans, found.logprobs, strict=True):
        assert abs(logprob - (by_hand[span] - total)) <= 1e-9


def test_a_target_is_the_span_of_its_characters(pieces: WordPieces) -> None:
    """Where a window holds the answer whole and it is short enough its tokens are told, else nothing."""
    format_ = AnswerFormat(max_tokens=64, doc_stride=5, max_answer_tokens=8)
    (window,) = format_.encode(TEXT, pieces)
    start = TEXT.index("144")
    place = format_.target(window, start, start + 3)

    assert place is not None
    assert window.starts[place[0] - 1] == start
    assert window.ends[place[1] - 1] == start + 3
    assert format_.target(window, 0, len(TEXT)) is None
    assert format_.target(window, start, start) is None


@given(
    scores=st.lists(st.floats(-30, 30), min_size=1, max_size=40),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    top_p=st.floats(0.01, 1),
)
def test_acc_E01_no_span_is_drawn_twice(scores: list[float], count: int, seed: int, top_p: float) -> None:
    """As many different spans as asked for, or all there are; the same seed draws the same."""
    values = np.array(scores)
    candidates = Candidates([(i, i + 1) for i in range(len(scores))], values - np.logaddexp.reduce(values))
    chosen = candidates.sample(count, seed=seed, top_p=top_p)
    spans = [(item.start, item.end) for item in chosen]

    assert len(spans) == len(set(spans)) == min(count, len(scores))
    assert chosen == candidates.sample(count, seed=seed, top_p=top_p)
    for item in chosen:
        assert item.probability == pytest.approx(float(np.exp(candidates.logprobs[item.start])))


def test_draws_follow_the_probabilities() -> None:
    """
    Of 4,000 seeds the first draw has the shares of the model, the second those among what is left; outside of the
    nucleus nothing is drawn while it has enough; at temperature 0 the likeliest come in order. Inverse seen red: noise
    scaled by two.
    """
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    candidates = Candidates([(i, i + 1) for i in range(4)], np.log(shares))
    draws = [[p.start for p in candidates.sample(2, seed=seed, top_p=1.0)] for seed in range(4000)]
    first = np.bincount([draw[0] for draw in draws], minlength=4) / 4000
    second = np.bincount([draw[1] for draw in draws if draw[0] == 0], minlength=4)
    nucleus = {p.start for seed in range(200) for p in candidates.sample(2, seed=seed, top_p=0.7)}

    assert np.abs(first - shares).max() < 0.03
    assert np.abs(second / second.sum() - [0, 0.6, 0.3, 0.1]).max() < 0.04
    assert nucleus == {0, 1}
    assert [p.start for p in candidates.sample(3, seed=5, temperature=0)] == [0, 1, 2]


def test_partial_words_are_no_answers() -> None:
    """Of spans those stay that begin and end with words and say something, with their probabilities."""
    spans = [(0, 3), (0, 2), (1, 3), (3, 4), (0, 4), (2, 4)]
    candidates = Candidates(spans, np.log(np.full(6, 1 / 6)))
    left = candidates.worded("Ada.")

    assert left.spans == [(0, 3), (0, 4)]
    assert left.sample(5, seed=1, temperature=0)[0].probability == pytest.approx(1 / 6)


def test_the_rule_takes_names_and_numbers() -> None:
    """Runs of capitals and digits, marks within a number or a name belonging to it; each is as likely."""
    text = "In 1,728 days Ada Noor of Saint-Denis won 3.5 cups. Nobody saw."
    found = capitals_and_numbers(text)

    assert [text[start:end] for start, end in found.spans] == [
        "In 1,728", "Ada Noor", "Saint-Denis", "3.5", "Nobody",
    ]  # fmt: skip
    assert np.allclose(np.exp(found.logprobs), 1 / 5)
    assert capitals_and_numbers("nothing here").sample(3, seed=1) == []


def test_a_table_is_not_one_answer() -> None:
    """A run has sixteen words at most, and a longer one is cut: nothing is left out. Inverse seen red: no limit."""
    table = " ".join(str(n) for n in range(100, 140))
    found = capitals_and_numbers(f"{table}, seen by Noor")

    assert [len(table[start:end].split()) for start, end in found.spans[:-1]] == [RUN_WORDS, RUN_WORDS, 8]
    assert " ".join(table[start:end] for start, end in found.spans[:-1]) == table
    assert np.allclose(np.exp(found.logprobs), 1 / 4)


def test_a_task_file_comes_back() -> None:
    """What is written is read."""
    format_ = AnswerFormat(max_answer_tokens=3)

    assert AnswerFormat.from_task_file(format_.task_file()) == format_
    assert format_.labels == ("1", "2", "3")
