"""Metrics against second implementations, and what they say at the edges."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score as peer_f1

from trilithon_finetune.metrics.answer_lists import list_scores
from trilithon_finetune.metrics.classification import accuracy, class_scores, macro_f1, positive_scores
from trilithon_finetune.metrics.span_f1 import micro, span_scores
from trilithon_finetune.metrics.squad import (
    Question,
    best_of,
    best_threshold,
    evaluate,
    exact_match,
    normalise,
    token_f1,
)
from trilithon_server.tasks.tagging import labels_of

LABELS = labels_of(["x", "y"])
TAGS = st.lists(st.lists(st.sampled_from(LABELS), min_size=1, max_size=12), min_size=1, max_size=4)
WORDS = st.lists(st.sampled_from(["a", "The", "cat", "cat", "sat.", "1066", "\u00e9t\u00e9", "-"]), max_size=6)
ANSWERS = WORDS.map(" ".join) | st.text(
    st.one_of(st.sampled_from("aAnthe ,.!-'\u2019\u00a0\t_1"), st.sampled_from(string.ascii_letters), st.characters()),
    max_size=24,
)


@settings(deadline=None)
@given(gold=TAGS, data=st.data())
def test_acc_F01_span_f1_equals_seqeval(gold: list[list[str]], data: st.DataObject) -> None:
    """
    Precision, recall and F1 of any tags, legal or not, are those of seqeval in its strict reading of IOB2.

    Seen to fail when an I without its B begins an entity.
    """
    predicted = [data.draw(st.lists(st.sampled_from(LABELS), min_size=len(g), max_size=len(g))) for g in gold]
    total = micro(span_scores(gold, predicted))

    strict = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    assert total.f1 == pytest.approx(f1_score(gold, predicted, **strict))
    assert total.precision == pytest.approx(precision_score(gold, predicted, **strict))
    assert total.recall == pytest.approx(recall_score(gold, predicted, **strict))


def _peer_words(text: str) -> list[str]:
    """SQuAD's normalisation once more, without regular expressions."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    runs = ["".join(run) for _, run in itertools.groupby(kept, key=str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def _peer_f1(predicted: str, gold: str) -> float:
    found, left, shared = _peer_words(predicted), _peer_words(gold), 0
    size = len(left)
    if not found or not left:
        return float(found == left)
    for word in found:
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = shared / len(found), shared / size
    return 2 * precision * recall / (precision + recall) if shared else 0.0


@settings(deadline=None)
@given(ANSWERS, ANSWERS)
def test_answers_are_compared_as_a_second_implementation_does(predicted: str, gold: str) -> None:
    """
    Exact match and F1 of any two texts, Unicode included, are those of code that shares nothing with ours.

    Seen to fail without the removal of articles, and with F1 over sets of words.
    """
    assert " ".join(_peer_words(gold)) == normalise(gold)
    assert exact_match(predicted, gold) == float(_peer_words(predicted) == _peer_words(gold))
    assert token_f1(predicted, gold) == pytest.approx(_peer_f1(predicted, gold))
    assert token_f1(gold, gold + " the") == 1.0


def test_the_gold_answer_that_fits_best_counts() -> None:
    """Several gold answers are alternatives; blank ones and none at all mean that there is no answer."""
    assert best_of(exact_match, "in 1066", ["1066", "In 1066."]) == 1.0
    assert best_of(exact_match, "", []) == 1.0
    assert best_of(token_f1, "1066", ["the"]) == 0.0
    assert best_of(token_f1, "1066", ["", "1066"]) == 1.0


def test_questions_without_answers_are_reported_apart() -> None:
    """With a threshold the model may say nothing; without one it never does."""
    questions = [
        Question(("Paris",), "Paris", -3.0),
        Question(("the Seine",), "Seine river", 1.0),
        Question((), "London", 2.0),
    ]

    said = evaluate(questions, null_threshold=0.0)
    assert said["exact"] == pytest.approx(2 / 3)
    assert (said["has_answer_exact"], said["has_answer_f1"], said["no_answer_f1"]) == (0.5, 0.5, 1.0)
    assert evaluate(questions, null_threshold=None)["no_answer_f1"] == 0.0
    assert said["best_threshold"] == 1.0
    assert said["best_f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert set(evaluate(questions[:2], null_threshold=None)) == {"exact", "f1"}


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([("a b c",), ()]), st.sampled_from(["b c", "x", ""]), st.integers(-3, 3)), min_size=1
    )
)
def test_no_threshold_is_better_than_the_best(cases: list[tuple[tuple[str, ...], str, int]]) -> None:
    """
    The best threshold gives the F1 it promises, and trying them all finds nothing better.

    Seen to fail when questions of equal margin are taken one by one.
    """
    questions = [Question(golds, answer, float(margin)) for golds, answer, margin in cases]
    best, threshold = best_threshold(questions)

    assert evaluate(questions, null_threshold=threshold)["f1"] == pytest.approx(best)
    tried = [evaluate(questions, null_threshold=float(value))["f1"] for value in range(-5, 5)]
    assert best == pytest.approx(max(tried))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abn"), st.sampled_from("abn")), min_size=1, max_size=30))
def test_label_scores_equal_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    """Accuracy, macro-F1, and micro-F1 without the negative class are scikit-learn's."""
    gold, predicted = [a for a, _ in pairs], [b for _, b in pairs]
    each = class_scores(gold, predicted)
    assert accuracy(gold, predicted) == pytest.approx(accuracy_score(gold, predicted))
    assert macro_f1(gold, predicted) == pytest.approx(peer_f1(gold, predicted, average="macro"))
    positive = peer_f1(gold, predicted, average="micro", labels=["a", "b"], zero_division=0)
    assert positive_scores(gold, predicted, negative="n").f1 == pytest.approx(positive)
    assert sum(score.gold for score in each.values()) == len(pairs)


def test_the_negative_class_earns_nothing() -> None:
    """A model that finds no relation has accuracy and no F1."""
    gold = ["x", "false", "false"]

    assert accuracy(gold, ["false"] * 3) == pytest.approx(2 / 3)
    assert positive_scores(gold, ["false"] * 3, negative="false").f1 == 0.0


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["The BRCA1", "p53"], (1.0, 1.0, 1.0)),
        (["p53", "x", "y", "z", "brca1!"], (0.0, 1.0, 0.2)),
        (["p53", "x", "y", "z", "w", "BRCA1"], (0.0, 0.0, 0.0)),
        ([], (0.0, 0.0, 0.0)),
    ],
    ids=["first", "fifth", "sixth", "none"],
)
def test_lists_count_their_first_five(answers: Sequence[str], expected: tuple[float, float, float]) -> None:
    """Strict and lenient accuracy and the reciprocal rank, after normalisation."""
    assert tuple(list_scores([(answers, ["BRCA1", "FANCS"])]).values()) == pytest.approx(expected)
