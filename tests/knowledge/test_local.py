"""Local knowledge: what sentences score, which are chosen, and the floors that this reaches on real conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

import trilithon_server
from trilithon.errors import InvalidArgument
from trilithon_finetune.data.oracle_knowledge import oracle_knowledge
from trilithon_server.knowledge.html import PageLimits
from trilithon_server.knowledge.local import SCORERS, Choice, Document, LocalKnowledge, read_documents
from trilithon_server.knowledge.sentences import Sentence
from trilithon_server.knowledge.tfidf import TermCounts
from trilithon_server.knowledge.word_lists import stop_words

SharedData = Callable[[str], Path]

WORDS = ["mill", "river", "stone", "wheel", "the", "of", "and", "Bread", "flour", "it's", "caf\u00e9", "1820", "x"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def sentences(texts: Sequence[str]) -> list[Sentence]:
    """Sentences of one document."""
    return [Sentence(text, "d", i, 0, len(text)) for i, text in enumerate(texts)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def peer_cosines(
    texts: Sequence[str],
    context: Sequence[str],
    *,
    longest: int,
    left_out: list[str],
    fit: Sequence[str] | None = None,
) -> np.ndarray:
    """What scikit-learn makes of the same: [texts, context]; by default fitted on both."""
    vectorizer = TfidfVectorizer(
        token_pattern=r"\w+", ngram_range=(1, longest), stop_words=left_out or None, sublinear_tf=True
    )
    vectorizer.fit([*texts, *context] if fit is None else fit)
    product: np.ndarray = (vectorizer.transform(texts) @ vectorizer.transform(context).T).toarray()
    return product


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=50),
    context=st.lists(TEXTS, min_size=1, max_size=3),
    longest=st.integers(1, 3),
    left_out=st.booleans(),
)
def test_acc_B01_tfidf_equals_scikit_learn(texts: list[str], context: list[str], longest: int, left_out: bool) -> None:
    """
    Cosines of up to 50 sentences with a context are those of TfidfVectorizer with the same options, to 1e-6.

    Inverse check: with pairs of words that stood next to each other before the stop words left, with plain counts, or
    with the context not counted, they are not.
    """
    left = sorted(stop_words()) if left_out else []
    if not any(word not in left for text in [*texts, *context] for word in re.findall(r"\w+", text.lower())):
        return
    vectors = TermCounts(texts, longest=longest, left_out=left).weighted(context)
    ours = np.stack([vectors.products(vector) for vector in vectors.context], axis=1)

    np.testing.assert_allclose(ours, peer_cosines(texts, context, longest=longest, left_out=left), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_likeness_of_sentences_is_their_cosine(texts: list[str]) -> None:
    """A sentence is like itself by 1, or by 0 where it has no terms, and like others as scikit-learn has it."""
    vectors = TermCounts(texts, left_out=()).weighted([])
    ours = np.stack([vectors.similarities(row) for row in range(len(texts))])

    if any(texts):
        np.testing.assert_allclose(ours, peer_cosines(texts, texts, longest=2, left_out=[], fit=texts), atol=1e-6)
    else:
        assert not ours.any()


MILL = [
    "The mill by the river ground flour for three villages.",
    "The wheel of the mill is made of oak.",
    "A museum of stones opened in the town.",
    "The wheel of the mill is made of oak and iron.",
    "Bread is baked every Sunday by the baker.",
    "The river floods the town in spring.",
]


def test_acc_B01_golden_ranking() -> None:
    """What goes with the last two turns comes first, the last turn before the one before it."""
    base = LocalKnowledge(sentences(MILL))
    turns = ["Who bakes the bread?", "Does the river flood?", "What is the wheel of the mill made of?"]
    scores = base.scores(turns, Choice())

    assert np.argsort(-scores, kind="stable").tolist() == [1, 3, 0, 5, 2, 4]
    assert scores[4] == 0
    assert base.scores(turns, Choice(turns=3))[4] > 0


def test_acc_B01_older_turns_weigh_less() -> None:
    """The query is the last turns' vectors of length 1, each weighed 0.7 for every turn that follows."""
    turns = ["The river?", "mill wheel", "Bread of the baker"]
    base = LocalKnowledge(sentences(MILL))
    last = [TermCounts(MILL).weighted(turns[1:])]
    query = 0.7 * last[0].context[0] + last[0].context[1]

    expected = last[0].products(query / np.linalg.norm(query))
    np.testing.assert_allclose(base.scores(turns, Choice()), expected, atol=1e-12)


@pytest.mark.parametrize("scorer", SCORERS)
def test_acc_B01_ties_go_to_the_earlier_and_answers_come_in_document_order(scorer: Any) -> None:
    """
    Of sentences that score the same the earlier is taken, and what is taken is told in the order of the documents.

    Inverse check: with the later of two equals another is taken first.
    """
    texts = ["nothing else", "mill wheel", "river flood", "mill wheel", "river flood", "mill", "nothing more"]
    vectors = np.array([[0, 1], [1, 0], [0.6, 0.8], [1, 0], [0.6, 0.8], [0.9, 0.1], [0, -1]], np.float32)
    base = LocalKnowledge(sentences(texts), vectors_NH=vectors)
    asked = np.array([[1, 0]], np.float32)
    one, chosen = (
        base.select(["mill wheel"], Choice(scorer=scorer, top_k=k, relevance=1.0, min_score=0.0), turn_vectors_MH=asked)
        for k in (1, 2)
    )

    assert [first.sentence.number for first in one] == [1]
    assert [one.sentence.number for one in chosen] == [1, 3]
    assert scorer == "hybrid" or chosen[0].score == chosen[1].score


def test_what_says_the_same_is_chosen_once() -> None:
    """With less weight on relevance the second choice is another sentence, not the same one again."""
    base = LocalKnowledge(sentences(MILL))
    turns = ["What of the wheel of the mill, made of oak? Does the river flood?"]

    assert [c.sentence.number for c in base.select(turns, Choice(top_k=2, relevance=1.0))] == [1, 3]
    assert [c.sentence.number for c in base.select(turns, Choice(top_k=2, relevance=0.5))] == [1, 5]


def peer_selection(
    scores: Sequence[float], cosines: np.ndarray, *, k: int, least: float, relevance: float
) -> list[int]:
    """Maximal marginal relevance once more, by the book: over sets, one candidate at a time."""
    left = [i for i, score in enumerate(scores) if score >= least and score > 0]
    taken: list[int] = []
    while left and len(taken) < k:
        values = [
            relevance * scores[i] - (1 - relevance) * max((cosines[i, j] for j in taken), default=0) for i in left
        ]
        taken.append(left.pop(values.index(max(values))))
    return sorted(taken)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 30),
    k=st.integers(0, 8),
    relevance=st.sampled_from([0.3, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_selection_equals_a_second_implementation(count: int, k: int, relevance: float, seed: int) -> None:
    """
    Any vectors give the choice of code that shares nothing with ours.

    Inverse check: with the likeness to the last choice in the place of the highest, or without the least score.
    """
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    base = LocalKnowledge(sentences(["words"] * count), vectors_NH=vectors.astype(np.float32))
    query = rng.standard_normal((1, 4)).astype(np.float32)
    choice = Choice(scorer="dense", top_k=k, relevance=relevance)
    scores = base.scores(["words"], choice, turn_vectors_MH=query)
    chosen = base.select(["words"], choice, turn_vectors_MH=query)

    np.testing.assert_allclose(scores, vectors @ query[0] / np.linalg.norm(query), atol=1e-6)
    expected = peer_selection(scores.tolist(), vectors @ vectors.T, k=k, least=0.25, relevance=relevance)
    assert [one.sentence.number for one in chosen] == expected


def test_hybrid_adds_what_both_rankings_say() -> None:
    """A sentence that stands first in one ranking and nowhere in the other has 1 / 61; both add up."""
    vectors = np.array([[1, 0], [0.8, 0.6], [-1, 0]], np.float32)
    base = LocalKnowledge(sentences(["alpha", "beta", "beta beta"]), vectors_NH=vectors)
    scores = base.scores(["beta"], Choice(scorer="hybrid"), turn_vectors_MH=np.array([[1, 0]], np.float32))

    bm25 = base.scores(["beta"], Choice(scorer="bm25"))
    assert bm25[0] == 0
    assert bm25[2] > bm25[1] > 0
    assert scores == pytest.approx([1 / 61, 1 / 62 + 1 / 62, 1 / 61])


@pytest.mark.parametrize("scorer", SCORERS)
def test_acc_B07_there_may_be_nothing_to_choose(scorer: Any) -> None:
    """An empty base, a conversation that says nothing, and one about something else choose nothing."""
    vectors = np.array([[0, 1]], np.float32)
    off = np.array([[1, 0]], np.float32)
    empty = LocalKnowledge([], vectors_NH=np.zeros((0, 2), np.float32))
    base = LocalKnowledge(sentences(["The mill stands by the river."]), vectors_NH=vectors)
    signs = LocalKnowledge(sentences(["- - - - -"]), vectors_NH=np.zeros((1, 2), np.float32))
    choice = Choice(scorer=scorer)

    assert empty.select(["The mill?"], choice, turn_vectors_MH=off) == []
    assert base.select(["", "Nobody knows."], choice, turn_vectors_MH=np.array([[0, 0], [1, 0]], np.float32)) == []
    assert base.select([], choice, turn_vectors_MH=np.zeros((0, 2), np.float32)) == []
    assert signs.select(["The mill?"], choice, turn_vectors_MH=off) == []


@pytest.mark.parametrize("scorer", SCORERS)
def test_acc_B07_ten_thousand_sentences_are_chosen_from(scorer: Any) -> None:
    """In a base of 10,000 sentences those that a turn repeats are found; `benchmarks/knowledge.py` says how fast."""
    rng = np.random.default_rng(3)
    shares = 1 / np.arange(1, 20_001)
    words = rng.choice([f"word{i}" for i in range(20_000)], (10_000, 20), p=shares / shares.sum())
    vectors = rng.standard_normal((10_000, 384), dtype=np.float32)
    base = LocalKnowledge(sentences([" ".join(row) for row in words]), vectors_NH=vectors)
    turns = [" ".join(words[7]), " ".join(words[9])]
    chosen = base.select(turns, Choice(scorer=scorer), turn_vectors_MH=vectors[[7, 9]])

    assert {7, 9} <= {one.sentence.number for one in chosen}


def test_acc_B07_unicode() -> None:
    """Words of any script are words, capitals of any script are none."""
    base = LocalKnowledge(
        sentences(["\u0420\u0435\u043a\u0430 \u0442\u0435\u0447\u0451\u0442", "\u00c9t\u00e9 \U0001f30a"])
    )

    assert [c.sentence.number for c in base.select(["\u0440\u0435\u043a\u0430"], Choice())] == [0]
    assert [c.sentence.number for c in base.select(["\u00e9t\u00e9"], Choice(scorer="bm25"))] == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scorer": "oracle"}, "scorer must be one of tfidf, bm25, dense, hybrid. Given: 'oracle'."),
        ({"top_k": -1}, "top_k must be at least 0. Given: -1."),
        ({"min_score": float("nan")}, "min_score must be a finite number. Given: nan."),
        ({"relevance": 0.0}, "relevance must be above 0 and at most 1. Given: 0.0."),
        ({"turns": 0}, "turns must be at least 1. Given: 0."),
        ({"decay": 1.5}, "decay must be above 0 and at most 1. Given: 1.5."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_acc_B07_choices_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    """The server knows no oracle, and every number has its range."""
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        Choice(**values)


def test_acc_B07_vectors_that_are_not_there_are_refused() -> None:
    """Without an encoder the scorers that need one say so; the others work."""
    base = LocalKnowledge(sentences(MILL))
    for scorer in ("dense", "hybrid"):
        with pytest.raises(InvalidArgument, match=f"^scorer {scorer} needs vectors"):
            base.select(["The mill?"], Choice(scorer=scorer))  # type: ignore[arg-type]  # both are scorers


def test_acc_B07_the_oracle_is_no_part_of_the_server() -> None:
    """
    Choosing by the gold reply marks its rows, and no module of the server names it.

    Inverse check: with the function moved into the server's module its name is found.
    """
    rows = oracle_knowledge(
        LocalKnowledge(sentences(MILL)), "It is made of oak and iron, the wheel of the mill.", choice=Choice(top_k=1)
    )
    server = Path(trilithon_server.__file__).parent

    assert [(row["doc_id"], row["sent_idx"], row["selected_by"]) for row in rows] == [("d", 3, "oracle")]
    assert not [path for path in server.rglob("*.py") if re.search(r"\boracle", path.read_text(), re.IGNORECASE)]


def test_documents_become_sentences() -> None:
    """Texts and pages, titles of their own or the page's; what was said before is not said again."""
    documents = [
        Document(id="a", html="<title>Mills</title><p>The mill stands by the river.</p>", url="https://example.org/a"),
        Document(id="b", text="The mill stands by the river. The wheel is made of oak.", title="Wheels"),
        Document(id="c"),
    ]

    assert [(s.document_id, s.title, s.number, s.text) for s in read_documents(documents)] == [
        ("a", "Mills", 0, "The mill stands by the river."),
        ("b", "Wheels", 1, "The wheel is made of oak."),
    ]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([Document(id="")], r"^documents\[0\]\.id must not be empty"),
        ([Document(id="a"), Document(id="a")], r"^documents\[1\]\.id must be given once\. Given twice: 'a'"),
        ([Document(id="a", text="x", html="x")], r"^documents\[0\] must have text or html\. Given: both"),
        ([Document(id="a"), Document(id="b", text="x" * 11)], r"^documents\[1\]\.text must have at most 10 bytes"),
        ([Document(id="a", html="<p>" + "x" * 11)], r"^documents\[0\]\.html must have at most 10 bytes"),
    ],
    ids=["no id", "twice", "both", "long text", "long page"],
)
def test_documents_that_are_wrong_are_named(documents: list[Document], message: str) -> None:
    """The message says which document and what is allowed."""
    with pytest.raises(InvalidArgument, match=message):
        read_documents(documents, limits=PageLimits(bytes=10))


def ranks(counts: TermCounts, asked: Sequence[tuple[str, int]]) -> np.ndarray:
    """Of each question the rank of its sentence, from 0, with weights from the sentences alone."""
    found = []
    for question, gold in asked:
        vectors = counts.weighted([question], counted=False)
        order = np.argsort(-vectors.products(vectors.context[0]), kind="stable")
        found.append(int(np.flatnonzero(order == gold)[0]))
    return np.array(found)


def shares(ranks: np.ndarray, *ks: int) -> list[float]:
    """Recall at each k, in percent."""
    return [100 * float(np.mean(ranks < k)) for k in ks]


def test_acc_B01_floor_of_questions_and_their_sentences(shared_data: SharedData) -> None:
    """Unigrams find the sentence of an answer within its article as often as published, to 0.3 points."""
    found = []
    for article in json.loads(shared_data("qa/xquad_en.json").read_bytes())["data"]:
        texts: list[str] = []
        asked: list[tuple[str, int]] = []
        for paragraph in article["paragraphs"]:
            starts = [0, *(m.end() for m in re.finditer(r"(?<=[.!?])\s+", paragraph["context"]))]
            for qa in paragraph["qas"]:
                place = qa["answers"][0]["answer_start"]
                asked.append((qa["question"], len(texts) + sum(start <= place for start in starts) - 1))
            texts += re.split(r"(?<=[.!?])\s+", paragraph["context"])
        found.append(ranks(TermCounts(texts, longest=1, left_out=()), asked))

    assert shares(np.concatenate(found), 1, 5, 10) == pytest.approx([73.9, 93.1, 96.5], abs=0.3)


def test_acc_B01_floor_of_messages_and_their_knowledge(shared_data: SharedData) -> None:
    """Unigrams find the knowledge of a message among all as often as published, to 0.3 points."""
    rows = rows_of(shared_data("dialogue/begin_wow.jsonl"))
    knowledge = list(dict.fromkeys(row["knowledge"] for row in rows))
    places = {text: i for i, text in enumerate(knowledge)}
    pairs = dict.fromkeys((row["message"], places[row["knowledge"]]) for row in rows)

    assert (len(knowledge), len(pairs)) == (1046, 1882)
    found = ranks(TermCounts(knowledge, longest=1, left_out=()), list(pairs))
    assert shares(found, 1, 5, 20) == pytest.approx([4.4, 15.4, 29.9], abs=0.3)


def test_acc_B01_floor_of_turns_and_what_their_writers_read(shared_data: SharedData) -> None:
    """
    The best sentence of what a speaker had before them is from the section that they used as often as published, to 3
    points, which is more often than by chance.
    """
    hits, chances = [], []
    for row in rows_of(shared_data("dialogue/topical_chat_valid_freq.jsonl")):
        for i, turn in enumerate(row["turns"]):
            read = {name: s for name, s in row["reading"].get(turn["agent"], {}).items() if s.get("wiki")}
            used = set(turn["knowledge"]) & set(read)
            if i == 0 or not used or len(read) < 2:
                continue
            texts = [(n, f"{s['entity']} {t}") for n, s in read.items() for t in re.split(r"(?<=[.!?])\s+", s["wiki"])]
            base = LocalKnowledge(sentences([text for _, text in texts]))
            asked = [before["text"] for before in row["turns"][max(0, i - 2) : i]]
            hits.append(texts[int(np.argmax(base.scores(asked, Choice())))][0] in used)
            chances.append(len(used) / len(read))

    assert len(hits) == 1626
    assert 100 * np.mean(chances) == pytest.approx(35.8, abs=0.1)
    assert 100 * np.mean(hits) == pytest.approx(47.1, abs=3)
