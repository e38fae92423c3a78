"""An index while it is served: one version a search, swapped at any time, closed when nobody holds it."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from knowledge.retrieval_cases import ENCODER, random_vectors, told

from trilithon.errors import Conflict, FailedPrecondition, InvalidArgument, Unavailable
from trilithon_server.knowledge.index import IndexStore
from trilithon_server.knowledge.live import Found, LiveIndex
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.version import IndexVersion, Mode, Queries, log_probabilities

WIDTH = 8
MODES: tuple[Mode, ...] = ("dense", "bm25", "hybrid")
QUERIES = Queries(
    texts=["number1 told", "number2 told"], vectors_NH=random_vectors(2, WIDTH, seed=0), model_digest="a1"
)


def version(root: Path, number: int, *, name: str = "wiki", digest: str = "a1") -> IndexVersion:
    """Publish and open the next version, whose passages say of which one they are."""
    store = IndexStore(root)
    encoder = ENCODER.model_copy(update={"model_digest": digest})
    made = store.publish(name, told(number), random_vectors(5, WIDTH, seed=number), encoder=encoder, created=0)
    assert made == number
    return store.open(name, model_digest=digest)


def versions_in(found: Found) -> set[int]:
    """Of which versions the passages of a result are."""
    return {int(hit.passage.text.rsplit("version", 1)[1]) for hits in found.hits for hit in hits}


def test_acc_A04_four_searchers_never_see_two_versions(tmp_path: Path) -> None:
    """
    While 30 versions take each other's place, four threads search: all passages of a result are of the version that it
    names, no search fails, versions never go back, and every version but the last is closed in the end.

    Inverse check: seen to fail with the version's number read after the search, and with replaced versions left open.
    """
    made = [version(tmp_path, number) for number in range(1, 31)]
    live = LiveIndex(made[0])
    stop = threading.Event()
    wrong: list[Any] = []
    seen: list[list[int]] = [[] for _ in range(4)]

    def search(searcher: int) -> None:
        turn = 0
        while not stop.is_set():
            try:
                found = live.search(QUERIES, 3, mode=MODES[turn % 3])
            except BaseException as error:
                wrong.append(error)
                return
            if versions_in(found) != {found.index_version} or len(found.hits) != 2:
                wrong.append(found)
            seen[searcher].append(found.index_version)
            turn += 1

    threads = [threading.Thread(target=search, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for index in made[1:]:
        before = [len(numbers) for numbers in seen]
        deadline = time.monotonic() + 60
        while not wrong and any(len(numbers) < count + 3 for numbers, count in zip(seen, before, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        live.swap(index)
    stop.set()
    for thread in threads:
        thread.join(60)
    last = live.search(QUERIES, 1, mode="dense")

    assert wrong == []
    assert all(numbers == sorted(numbers) for numbers in seen)
    assert {number for numbers in seen for number in numbers} >= set(range(1, 30))
    assert last.index_version == 30
    assert [index.is_open for index in made] == [False] * 29 + [True]


def test_acc_A04_results_change_with_the_swap_alone(tmp_path: Path) -> None:
    """A newer version on the disk, and open, changes nothing until it is swapped in; then everything is its own."""
    live = LiveIndex(version(tmp_path, 1))
    before = live.search(QUERIES, 3, mode="hybrid")
    newer = version(tmp_path, 2)
    beside = live.search(QUERIES, 3, mode="hybrid")
    live.swap(newer)
    after = live.search(QUERIES, 3, mode="hybrid")

    assert before == beside
    assert (before.index_version, after.index_version, live.version) == (1, 2, 2)
    assert (versions_in(before), versions_in(after)) == ({1}, {2})


def test_a_version_is_closed_when_its_last_search_has_ended(tmp_path: Path) -> None:
    """
    Two hold the old version over a swap: it answers both to the end, then its files are let go.

    Inverse check: seen to fail with the version closed at the swap, or by the first of the two, and with searches that
    are not counted.
    """
    old = version(tmp_path, 1)
    live = LiveIndex(old)
    with live.reading() as one:
        with live.reading() as two:
            live.swap(version(tmp_path, 2))
            with live.reading() as three:
                assert three.version == 2
            assert two.search(QUERIES, 1, mode="dense")
        assert one is two is old
        assert versions_in(Found(tuple(one.search(QUERIES, 1, mode="bm25")), 1)) == {1}
        assert old.is_open
    assert not old.is_open
    assert str(tmp_path / "wiki" / "v00000001") not in Path("/proc/self/maps").read_text()
    assert str(tmp_path / "wiki" / "v00000002") in Path("/proc/self/maps").read_text()


def test_a_search_that_fails_lets_go(tmp_path: Path) -> None:
    """An error in a search doesn't keep the version open for ever."""
    old = version(tmp_path, 1)
    live = LiveIndex(old)
    with pytest.raises(InvalidArgument):
        live.search(QUERIES, 0, mode="dense")
    live.swap(version(tmp_path, 2))

    assert not old.is_open


def test_acc_A04_an_older_version_than_asked_for_is_not_searched(tmp_path: Path) -> None:
    """
    `min_version` above what is served is a failed precondition that names what is served; equal is fine.

    Inverse check: seen to fail when an equal version is refused.
    """
    version(tmp_path, 1)
    live = LiveIndex(version(tmp_path, 2))
    with pytest.raises(FailedPrecondition, match=r"in version 3 or a newer one\. Given: version 2 is served") as caught:
        live.search(QUERIES, 1, mode="dense", min_version=3)

    assert (caught.value.code, caught.value.grpc_status) == ("index_version", "FAILED_PRECONDITION")
    assert live.search(QUERIES, 1, mode="dense", min_version=2).index_version == 2
    live.swap(version(tmp_path, 3))
    assert live.search(QUERIES, 1, mode="dense", min_version=3).index_version == 3


def test_acc_A04_a_swap_to_another_encoder_refuses_the_old_one_s_queries(tmp_path: Path) -> None:
    """Queries that were encoded before the swap are refused after it, and answered by who holds the old version."""
    live = LiveIndex(version(tmp_path, 1))
    with live.reading() as held:
        live.swap(version(tmp_path, 2, digest="b2"))
        with pytest.raises(FailedPrecondition, match=r"vectors of the encoder b2\. Given: queries of a1"):
            live.search(QUERIES, 1, mode="dense")
        assert held.manifest.encoder.model_digest == "a1"
        assert held.search(QUERIES, 1, mode="dense")


def test_only_a_newer_version_takes_the_place(tmp_path: Path) -> None:
    """Of two that refresh at once the later version stays; another index never does; what is refused stays open."""
    one, two = version(tmp_path, 1), version(tmp_path, 2)
    other = version(tmp_path, 1, name="other")
    live = LiveIndex(two)
    for index in (one, two, other):
        with pytest.raises(Conflict, match='index "wiki" version 2 is served, and only a newer one') as caught:
            live.swap(index)
        assert caught.value.code == "index_version"

    assert (live.version, one.is_open, other.is_open) == (2, True, True)


def test_a_closed_index_is_unavailable(tmp_path: Path) -> None:
    """Who holds it goes on; then it is closed, and closing again is nothing."""
    only = version(tmp_path, 1)
    live = LiveIndex(only)
    with live.reading() as held:
        live.close()
        with pytest.raises(Unavailable, match="not served any more"):
            live.search(QUERIES, 1, mode="dense")
        assert held.search(QUERIES, 1, mode="dense")
    live.close()

    assert not only.is_open
    with pytest.raises(Unavailable):
        live.swap(only)


# -- what a search finds -----------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> IndexVersion:
    """Four passages: a question for row 2 by its vector, for row 1 by its words, and for row 0 by some of both."""
    passages = [
        Passage(f"p{i}", title, text)
        for i, (title, text) in enumerate(
            [
                ("Tea", "green leaves"),
                ("Coffee", "roasted beans of coffee"),
                ("Milk", "from cows"),
                ("Water", "from wells"),
            ]
        )
    ]
    vectors = np.array([[0.8, 0.6], [-1, 0], [1, 0], [0, -1]], np.float32)
    store = IndexStore(tmp_path)
    store.publish("drinks", passages, vectors, encoder=ENCODER, created=0)
    return store.open("drinks", model_digest="a1")


ASKED = Queries(texts=["coffee or green tea"], vectors_NH=np.array([[1, 0]], np.float32), model_digest="a1")


def test_each_mode_ranks_its_way(index: IndexVersion) -> None:
    """Titles are searched as well; fused ranks put first what both think well of."""
    dense, words, both = (index.search(ASKED, 4, mode=mode)[0] for mode in MODES)

    assert [hit.row for hit in dense] == [2, 0, 3, 1]
    assert [hit.score for hit in dense] == pytest.approx([1, 0.8, 0, -1])
    assert {hit.row for hit in words} == {0, 1}
    assert both[0].row == 0
    ranks = {hit.row: 1 / (60 + rank) for rank, hit in enumerate(words, start=1)}
    for rank, hit in enumerate(dense, start=1):
        ranks[hit.row] = ranks.get(hit.row, 0) + 1 / (60 + rank)
    assert {hit.row: hit.score for hit in both} == pytest.approx(ranks)
    assert [hit.passage for hit in dense] == [index.passage(row) for row in (2, 0, 3, 1)]


def test_log_probabilities_are_of_what_was_retrieved(index: IndexVersion) -> None:
    """
    log p(z|q) = log-softmax of score_scale * score over the K retrieved: of inner products in a dense and in a hybrid
    search, of BM25 scores without a scale.

    Inverse check: seen to fail without the scale, and with fused scores in the place of inner products.
    """
    products = {0: 0.8, 1: -1.0, 2: 1.0, 3: 0.0}
    for mode in ("dense", "hybrid"):
        hits = index.search(ASKED, 2, mode=mode)[0]  # type: ignore[arg-type]  # a literal of the loop
        total = sum(math.exp(20 * products[hit.row]) for hit in hits)
        expected = [20 * products[hit.row] - math.log(total) for hit in hits]
        assert [hit.logprob for hit in hits] == pytest.approx(expected, rel=1e-5)
    words = index.search(ASKED, 2, mode="bm25")[0]
    total = sum(math.exp(hit.score) for hit in words)
    assert [hit.logprob for hit in words] == pytest.approx([hit.score - math.log(total) for hit in words])


def test_what_is_first_of_one_ranking_is_not_lost_behind_what_is_far_down_in_both(tmp_path: Path) -> None:
    """
    The eleven nearest passages have no word of the question, the ten with most of its words are the farthest, and forty
    others stand behind both in one order. Of five that are asked for, the nearest is one. Inverse seen: a hundred of
    each kind fused, which begin with those forty.
    """
    texts = ["elsewhere"] * 11 + ["word " * (50 - i) for i in range(40)] + ["word " * 80] * 10
    vectors_MH = np.zeros((len(texts), WIDTH), np.float32)
    vectors_MH[:, 0] = np.linspace(1, 0.1, len(texts))
    passages = [Passage(str(i), "", text) for i, text in enumerate(texts)]
    store = IndexStore(tmp_path)
    store.publish("wiki", passages, vectors_MH, encoder=ENCODER.model_copy(update={"model_digest": "a1"}), created=0)
    asked = Queries(texts=["word"], vectors_NH=np.eye(1, WIDTH, dtype=np.float32), model_digest="a1")
    index = store.open("wiki", model_digest="a1")

    assert [hit.row for hit in index.search(asked, 5, mode="hybrid")[0]] == [0, 51, 1, 52, 2]


@given(st.lists(st.floats(-1e4, 1e4, width=32), max_size=20), st.sampled_from([0.05, 1.0, 20.0]))
def test_probabilities_sum_to_one(scores: list[float], scale: float) -> None:
    """Whatever the scores, without overflow; of nothing there is nothing."""
    found = log_probabilities(scores, scale=scale)

    assert len(found) == len(scores)
    assert not scores or math.fsum(map(math.exp, found)) == pytest.approx(1)
    assert all(value <= 1e-12 for value in found)


def test_a_query_that_shares_no_word_finds_nothing_by_words(index: IndexVersion) -> None:
    """An empty result, not four passages of score 0; a hybrid search is then a dense one."""
    asked = Queries(texts=["zebra"], vectors_NH=ASKED.vectors_NH, model_digest="a1")

    assert index.search(asked, 3, mode="bm25") == [()]
    assert [hit.row for hit in index.search(asked, 3, mode="hybrid")[0]] == [2, 0, 3]


@pytest.mark.parametrize(
    ("queries", "top_k", "mode", "says"),
    [
        (ASKED, 0, "dense", "top_k must be at least 1. Given: 0"),
        (Queries(texts=["x"]), 1, "dense", "a dense search needs the queries' vectors. Given: texts alone"),
        (Queries(texts=["x"]), 1, "hybrid", "a hybrid search needs the queries' vectors"),
        (
            Queries(texts=["x", "y"], vectors_NH=ASKED.vectors_NH, model_digest="a1"),
            1,
            "hybrid",
            "as many texts as vectors. Given: 2 and 1",
        ),
    ],
)
def test_searches_that_lack_something_are_refused(
    queries: Queries, top_k: int, mode: Mode, says: str, index: IndexVersion
) -> None:
    """What is missing is named."""
    with pytest.raises(InvalidArgument, match=says) as caught:
        index.search(queries, top_k, mode=mode)

    assert caught.value.code == "search_invalid"
