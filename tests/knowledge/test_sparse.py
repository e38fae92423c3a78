"""BM25: the formula, ties, files, and the published accuracy on real questions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from knowledge.retrieval_cases import SharedData, read_qed, read_xquad

from trilithon.errors import InvalidArgument
from trilithon_finetune.metrics.retrieval import top_k_accuracy
from trilithon_server.knowledge.sparse import K1, SPARSE_FILES, B, SparseIndex
from trilithon_server.knowledge.words import contains, search_words

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join), min_size=1, max_size=8)


def by_formula(texts: Sequence[str], queries: Sequence[str], k1: float, b: float) -> list[list[float]]:
    """Every passage's BM25 for each query once more, straight from the formula, in float64."""
    counts = [Counter(search_words(text)) for text in texts]
    totals = [count.total() for count in counts]
    mean = sum(totals) / len(texts)
    held = Counter(word for count in counts for word in count)
    scores = []
    for query in queries:
        idf = {w: math.log(1 + (len(texts) - held[w] + 0.5) / (held[w] + 0.5)) for w in set(search_words(query))}
        scores.append(
            [
                sum(
                    idf[word] * count[word] * (k1 + 1) / (count[word] + k1 * (1 - b + b * total / mean))
                    for word in idf
                    if word in count
                )
                for count, total in zip(counts, totals, strict=True)
            ]
        )
    return scores


@given(
    texts=TEXTS.filter(any),
    query=st.lists(st.sampled_from("abcdex"), max_size=6).map(" ".join),
    k=st.integers(1, 10),
)
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.5, 0.0)])
def test_acc_A05_scores_are_those_of_the_formula(texts: list[str], query: str, k: int, k1: float, b: float) -> None:
    """
    Each distinct word of the query once, each passage that shares one, best first, of equal scores the earlier.

    Inverse check: seen to fail with the query's words counted as often as they come, with bm25s's `lucene` weight (no
    k1 + 1), and with its own selection of the best, which leaves ties to chance.
    """
    (expected,) = by_formula(texts, [query], k1, b)
    (found,) = SparseIndex.build(texts, k1=k1, b=b).search([query], k)

    assert found.scores.tolist() == pytest.approx([expected[row] for row in found.rows.tolist()], rel=1e-5)
    assert len(found) == min(k, sum(score > 0 for score in expected))
    order = list(zip((-found.scores).tolist(), found.rows.tolist(), strict=True))
    assert order == sorted(order)
    left = [score for row, score in enumerate(expected) if row not in found.rows.tolist()]
    assert not len(found) or max(left, default=0.0) <= found.scores[-1] * (1 + 1e-5)


def test_equal_passages_come_in_order() -> None:
    """Whatever k is, the first of equal passages come first, in any batch."""
    index = SparseIndex.build(["x y"] * 50 + ["z"])
    alone = index.search(["x"], 7)[0]
    beside = index.search(["z", "x", "q"], 7)

    assert alone.rows.tolist() == list(range(7)) == beside[1].rows.tolist()
    assert beside[0].rows.tolist() == [50]
    assert len(beside[2]) == 0


def test_a_saved_index_answers_the_same(tmp_path: Path) -> None:
    """Files of arrays and JSON, and nothing else; scores are equal bit for bit."""
    texts = ["the cat sat", "the dog", "caf\u00e9 \u767d", "!"]
    built = SparseIndex.build(texts, k1=1.2, b=0.5)
    built.save(tmp_path)
    loaded = SparseIndex.load(tmp_path, count=4)
    queries = ["the cat", "CAFE\u0301 \u767d", "nothing", ""]

    assert {path.name for path in tmp_path.iterdir()} == set(SPARSE_FILES)
    for name in SPARSE_FILES:
        if name.endswith(".npy"):
            assert np.load(tmp_path / name, allow_pickle=False).ndim == 1
        else:
            json.loads((tmp_path / name).read_text(encoding="utf-8"))
    assert loaded.count == 4
    for a, b in zip(built.search(queries, 3), loaded.search(queries, 3), strict=True):
        assert a.rows.tolist() == b.rows.tolist()
        assert a.scores.tolist() == b.scores.tolist()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("bm25_rows.npy", np.array([0, 1, 9], np.int32), "the BM25 arrays do not fit each other"),
        ("bm25_rows.npy", np.array([0, 1, -1], np.int32), "the BM25 arrays do not fit each other"),
        ("bm25_rows.npy", np.array([0, 1], np.int32), "the BM25 arrays do not fit each other"),
        ("bm25_starts.npy", np.array([0, 4, 3], np.int64), "the BM25 arrays do not fit each other"),
        ("bm25_starts.npy", np.array([0, 3], np.int64), r"2 words in bm25_words\.json, 1 in bm25_starts\.npy"),
        ("bm25_scores.npy", np.zeros(3, np.float64), r"bm25_scores\.npy must be float32 \[n\]\. Given: float64 \[3\]"),
        ("bm25_words.json", {"x": 0, "y": 0}, "must be of 2 passages and one vocabulary"),
        ("bm25.json", {"unknown": 1}, r"bm25\.json does not describe a BM25 index"),
    ],
)
def test_files_that_do_not_fit_are_refused(file: str, content: object, says: str, tmp_path: Path) -> None:
    """
    No search reads past an end: every row is a passage, every word a stretch of rows.

    Inverse check: each was seen to load without the check, and most to search without an error.
    """
    SparseIndex.build(["x y", "x"]).save(tmp_path)
    if isinstance(content, np.ndarray):
        np.save(tmp_path / file, content)
    else:
        (tmp_path / file).write_text(json.dumps(content))

    with pytest.raises(ValueError, match=says):
        SparseIndex.load(tmp_path, count=2)


def test_an_index_of_other_passages_is_refused(tmp_path: Path) -> None:
    """The number of passages must be that of the texts beside it."""
    SparseIndex.build(["x y", "x"]).save(tmp_path)

    with pytest.raises(ValueError, match=r"must be of 3 passages and one vocabulary\. Given: 2 passages"):
        SparseIndex.load(tmp_path, count=3)


@pytest.mark.parametrize(("k1", "b"), [(-0.1, 0.4), (float("nan"), 0.4), (float("inf"), 0.4), (0.9, 1.1), (0.9, -1)])
def test_numbers_out_of_range_are_refused(k1: float, b: float) -> None:
    """Rule and value are named."""
    with pytest.raises(InvalidArgument, match="k1 of at least 0 and b from 0 to 1") as caught:
        SparseIndex.build(["x"], k1=k1, b=b)

    assert caught.value.code == "index_invalid"


def test_passages_without_a_word_are_no_index() -> None:
    """One of them among others is never found; none but them cannot be searched."""
    assert SparseIndex.build(["?!", "x"]).search(["x"], 5)[0].rows.tolist() == [1]
    with pytest.raises(InvalidArgument, match="needs a passage with a word"):
        SparseIndex.build(["?!", "..."])


def holds(text: str, answers: Sequence[str]) -> bool:
    words = search_words(text)
    return any(contains(words, search_words(answer)) for answer in answers)


READ = {"xquad": read_xquad, "qed": read_qed}


@pytest.mark.parametrize(
    ("name", "words", "count", "expected"),
    [
        ("xquad", 0, 195, (92.9, 98.5, 99.3)),
        ("xquad", 100, 340, (88.6, 97.2, 98.4)),
        ("xquad", 50, 585, (75.3, 90.9, 95.1)),
        ("qed", 0, 1343, (83.3, 93.4, 97.6)),
        ("qed", 100, 2145, (74.2, 91.7, 95.8)),
    ],
)
def test_acc_A05_accuracy_on_real_questions(
    name: str, words: int, count: int, expected: tuple[float, float, float], shared_data: SharedData
) -> None:
    """
    Top-1, top-5 and top-20 of BM25 as another implementation measured them, to 0.1 points.

    Inverse check: seen to fail with b = 0.75, without titles, and with stop words left out.
    """
    read = READ[name](shared_data)
    passages = read.cut(words)
    rankings = SparseIndex.build([f"{title} {text}" for title, text in passages]).search(
        [question for question, _, _ in read.questions], 20
    )
    results = [[passages[row][1] for row in ranking.rows] for ranking in rankings]
    reached = top_k_accuracy(results, [answers for _, answers, _ in read.questions], [1, 5, 20], holds=holds)

    assert len(passages) == count
    assert [100 * reached[k] for k in (1, 5, 20)] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("name", "words"), [("xquad", 0), ("xquad", 100), ("xquad", 50), ("qed", 0), ("qed", 100)])
def test_acc_A05_bm25s_by_itself_finds_as_many(name: str, words: int, shared_data: SharedData) -> None:
    """
    The package's own words, stop words, weights and choice of the best, with the same two numbers, reach the same
    top-5 accuracy to 1.5 points: what we put in their place loses nothing.

    Inverse check: seen to fail with our words cut to four letters, and with a word's first occurrence alone counted.
    """
    read = READ[name](shared_data)
    passages = read.cut(words)
    questions = [question for question, _, _ in read.questions]
    texts = [f"{title} {text}" for title, text in passages]
    peer = bm25s.BM25(k1=K1, b=B)
    peer.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    theirs, _ = peer.retrieve(bm25s.tokenize(questions, show_progress=False), k=5, show_progress=False)
    ours = [ranking.rows for ranking in SparseIndex.build(texts).search(questions, 5)]
    answers = [found for _, found, _ in read.questions]
    reached = [
        100 * top_k_accuracy([[passages[row][1] for row in rows] for rows in ranked], answers, [5], holds=holds)[5]
        for ranked in (ours, theirs)
    ]

    assert reached[0] == pytest.approx(reached[1], abs=1.5)


def test_acc_A05_the_top_5_of_real_questions_are_those_of_the_formula(shared_data: SharedData) -> None:
    """
    What is found for every question of XQuAD has the five highest scores that code without bm25s gives.

    Inverse check: seen to fail with ATIRE's own idf, and with a question's words counted as often as they come.
    """
    read = read_xquad(shared_data)
    texts, questions = (
        [f"{title} {text}" for title, text in read.passages],
        [question for question, _, _ in read.questions],
    )
    for found, scores in zip(
        SparseIndex.build(texts).search(questions, 5), by_formula(texts, questions, K1, B), strict=True
    ):
        assert found.scores.tolist() == pytest.approx(sorted(scores, reverse=True)[: len(found)], rel=1e-5)
        assert found.scores.tolist() == pytest.approx([scores[row] for row in found.rows], rel=1e-5)
        assert len(found) == 5 or len(found) == sum(score > 0 for score in scores)


def test_acc_A05_the_question_s_own_paragraph(shared_data: SharedData) -> None:
    """How often the paragraph that the question belongs to is found, to 0.1 points."""
    read = read_qed(shared_data)
    rankings = SparseIndex.build([f"{title} {text}" for title, text in read.passages]).search(
        [question for question, _, _ in read.questions], 20
    )
    ranks = [
        ranking.rows.tolist().index(row) if row in ranking.rows else 99
        for (_, _, row), ranking in zip(read.questions, rankings, strict=True)
    ]

    reached = [100 * float(np.mean(np.array(ranks) < k)) for k in (1, 5, 20)]
    assert reached == pytest.approx((81.5, 92.8, 97.2), abs=0.1)
