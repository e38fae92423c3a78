"""What texts share and repeat: golden numbers on real files, second implementations, and the edges."""

from __future__ import annotations

import itertools
import json
import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from trilithon_finetune.metrics.control import Controlled, close_pairs, control_rate, leakage, mentions
from trilithon_finetune.metrics.knowledge_f1 import mean_word_f1, word_f1
from trilithon_finetune.metrics.texts import (
    adjusted_perplexity,
    distinct_share,
    ngram_entropy,
    ngrams,
    num_words,
    perplexity,
    repeat_share,
)
from trilithon_server.knowledge.antonyms import Synset, WordRelations

SharedData = Callable[[str], Path]

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=6)
REPLIES = st.text(st.sampled_from("aAntheT ,.!-'\u2019_1xy \u00e9"), max_size=30)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_acc_007_knowledge_f1_tells_attributable_replies(shared_data: SharedData) -> None:
    """
    Replies that people found to say what the knowledge says share more words with it: mean KF1 0.673 against 0.351.

    Inverse check: with punctuation taken out instead of parting words, and with articles kept, the means are others.
    """
    rows = rows_of(shared_data("dialogue/begin_wow.jsonl"))
    is_full = [row["label"] == "Fully attributable" for row in rows]
    scores = [word_f1(row["response"], row["knowledge"]) for row in rows]
    means = []
    for full in (True, False):
        kept = [row for row, label in zip(rows, is_full, strict=True) if label is full]
        means.append(mean_word_f1([row["response"] for row in kept], [row["knowledge"] for row in kept]))

    assert (len(rows), sum(is_full)) == (2000, 813)
    assert means == pytest.approx([0.673, 0.351], abs=0.001)
    assert roc_auc_score(is_full, scores) == pytest.approx(0.838, abs=0.001)


@pytest.mark.parametrize(
    ("file", "count", "expected"),
    [("five_sentence_stories.jsonl", 1077, (3.6, 85.1)), ("tinystories_sample.jsonl", 992, (47.8, 87.9))],
)
def test_acc_007_stories_repeat_themselves(
    shared_data: SharedData, file: str, count: int, expected: tuple[float, float]
) -> None:
    """4-repeat and distinct-4 are as published, to 0.1 points."""
    texts = [row.get("text") or " ".join(row["sentences"]) for row in rows_of(shared_data(f"stories/{file}"))]

    assert len(texts) == count
    assert (100 * repeat_share(texts), 100 * distinct_share(texts)) == pytest.approx(expected, abs=0.1)
    assert count != 1077 or sum(len(list(ngrams(text, 4))) for text in texts) == 56_753


def peer_words(text: str) -> list[str]:
    """Words as ParlAI has them, without regular expressions: an article is one wherever no letter touches it."""
    parted = "".join(" " if char in string.punctuation else char for char in text.lower())
    runs = ["".join(run) for _, run in itertools.groupby(parted, key=str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def peer_f1(reply: str, reference: str) -> float:
    """Word F1 once more, word by word."""
    found, left = peer_words(reply), peer_words(reference)
    size, shared = len(left), 0
    for word in found:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(found) + size) if shared else 0.0


@settings(deadline=None)
@given(REPLIES, REPLIES)
def test_word_f1_equals_a_second_implementation(reply: str, reference: str) -> None:
    """Any two texts, as code has it that shares nothing with ours."""
    assert word_f1(reply, reference) == pytest.approx(peer_f1(reply, reference))


def test_empty_references_are_skipped() -> None:
    """A turn without knowledge says nothing of how knowledge is used; an empty reply to some does."""
    assert mean_word_f1(["the mill", "x", "", "y"], ["mill", "", "mill", "The, a!"]) == 0.5
    assert mean_word_f1([], []) == 0.0
    assert word_f1("", "") == 0.0


@settings(deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_ngram_numbers_equal_second_implementations(texts: list[str], n: int) -> None:
    """
    Repetition, distinct n-grams and entropy of any texts, by loops over indices.

    Inverse check: with n-grams that cross from one text to the next.
    """
    grams = [[tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)] for t in texts]
    flat = [gram for one in grams for gram in one]
    shares = [count / len(flat) for count in Counter(flat).values()]

    assert repeat_share(texts, n) == (sum(len(set(g)) < len(g) for g in grams) / len(texts) if texts else 0)
    assert distinct_share(texts, n) == (len(set(flat)) / len(flat) if flat else 0)
    assert ngram_entropy(texts, n) == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_perplexity_is_by_what_is_counted() -> None:
    """By tokens, by words, and by words from a mean by tokens."""
    texts = ["the mill stands", "it is  old"]

    assert num_words(texts) == 6
    assert perplexity(12 * math.log(2), 12) == pytest.approx(2)
    assert perplexity(12 * math.log(2), num_words(texts)) == pytest.approx(4)
    assert adjusted_perplexity(math.log(2), num_tokens=11, num_words=6) == pytest.approx(4)


RELATIONS = WordRelations([("antonym", "good", "bad")], [Synset("n", ("car", "motor vehicle", "auto"))])


@pytest.mark.parametrize(
    ("sentence", "keyword", "expected"),
    [
        ("He stopped his cars.", "car", True),
        ("He stopped his cars.", "stop", True),
        ("He drove two autos.", "car", True),
        ("She had motor vehicles.", "the car", True),
        ("A vehicle with a motor.", "car", False),
        ("The car is red.", "red car", True),
        ("The car is blue.", "red car", False),
        ("The carpet is red.", "car", False),
        ("Lily's cat ran.", "lily", True),
        ("He is there.", "is", True),
        ("Anything at all.", "", False),
        ("", "car", False),
    ],
)
def test_a_sentence_mentions_a_keyword(sentence: str, keyword: str, expected: bool) -> None:
    """In any form and order, or by a synonym in one stretch; a part of a word is no mention."""
    assert mentions(sentence, keyword, RELATIONS) is expected


def test_control_and_leakage_are_shares() -> None:
    """
    Of four sentences two hold their keyword, one more is close to it; of the two that replaced one, one still has it.

    Inverse check: with leakage over all sentences it is a quarter.
    """
    cases = [
        Controlled("The bad dog ran.", "bad", replaced="good"),
        Controlled("The good dog ran.", "bad", replaced="good"),
        Controlled("Autos are fast.", "car"),
        Controlled("The sea is wide.", "boat"),
    ]

    assert control_rate(cases, RELATIONS) == 0.5
    assert control_rate(cases, RELATIONS, is_close=[False, False, False, True]) == 0.75
    assert leakage(cases, RELATIONS) == 0.5
    assert (control_rate([], RELATIONS), leakage(cases[2:], RELATIONS)) == (0.0, 0.0)


def peer_close(keywords: np.ndarray, sentences: np.ndarray) -> Sequence[bool]:
    """Pairs one by one."""
    unit = [[v / math.sqrt(sum(x * x for x in v)) for v in vectors] for vectors in (keywords, sentences)]
    count = len(keywords)
    others = [float(unit[0][i] @ unit[1][j]) for i in range(count) for j in range(count) if i != j]
    return [float(unit[0][i] @ unit[1][i]) > np.percentile(others, 90) for i in range(count)]


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_closeness_is_measured_against_pairs_of_strangers(count: int, seed: int) -> None:
    """
    Vectors of any length: a pair is close above the 90th percentile of the pairs that do not belong together.

    Inverse check: with the pairs that do among them.
    """
    rng = np.random.default_rng(seed)
    keywords = rng.standard_normal((count, 5)).astype(np.float32)
    sentences = (0.4 * keywords + rng.standard_normal((count, 5))).astype(np.float32)

    assert close_pairs(keywords, sentences) == list(peer_close(keywords.astype(float), sentences.astype(float)))
    assert close_pairs(keywords, 3 * keywords) == [True] * count
