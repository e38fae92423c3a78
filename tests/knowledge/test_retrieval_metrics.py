"""Whether texts hold answers, and what top-k accuracy and open exact match say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_finetune.metrics.retrieval import has_answer, has_pattern, open_exact_match, top_k_accuracy
from trilithon_finetune.metrics.squad import best_of, exact_match


@pytest.mark.parametrize(
    ("text", "answer", "held"),
    [
        ("He lived in the U.S. then", "U.S.", True),
        ("He lived in the US then", "U.S.", False),
        ("He lived in the U. S. then", "u.s.", True),
        ("a twenty-one gun salute", "twenty-one", True),
        ("a twenty-one gun salute", "twenty one", False),
        ("Wilhelm R\u00f6ntgen", "ro\u0308ntgen", True),
        ("Wilhelm R\u00f6ntgen", "rontgen", False),
        ("the catalogue", "cat", False),
        ("in 1066, at Hastings", "1066 at", False),
        ("in 1066, at Hastings", "1066, AT  hastings", True),
        ("anything", "", False),
        ("anything", " \u200b", False),
        ("", "x", False),
        ("stra\u00dfe", "STRASSE", False),
        ("$5 million", "$5", True),
    ],
)
def test_acc_A05_texts_that_hold_an_answer(text: str, answer: str, held: bool) -> None:
    """
    Whole words and signs in one stretch, whatever case and composition; blank answers are nowhere.

    Inverse check: seen to fail with plain substrings, without the decomposition, and with signs left out.
    """
    assert has_answer(text, [answer]) is held
    assert has_answer(text, ["\u2603", answer]) is held
    assert not has_answer(text, [])


@pytest.mark.parametrize(
    ("text", "pattern", "held"),
    [
        ("Room 9,500 feet", r"9,?\d{3}", True),
        ("it was HASTINGS", "hast.ngs", True),
        ("one\ntwo", "^two$", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("cafe\u0301", "caf\u00e9$", True),
        ("carpet", "car", True),
        ("nine", r"\d", False),
    ],
)
def test_acc_A05_answers_as_patterns(text: str, pattern: str, held: bool) -> None:
    """Patterns are searched anywhere, by line, whatever the case and composition."""
    assert has_answer(text, [pattern], regex=True) is held
    assert has_pattern(text, [pattern]) is held


def test_a_broken_pattern_is_an_error() -> None:
    """It is not taken for an answer that no text holds."""
    with pytest.raises(ValueError, match=r"must be a regular expression\. Given: '\(a'"):
        has_answer("a", ["(a"], regex=True)


def test_acc_A05_top_k_accuracy() -> None:
    """A question counts from the rank of the first text that holds any of its answers."""
    results = [["no", "the yes", "yes"], ["Yes!"], [], ["no"] * 5]
    answers = [["yes"], ["maybe", "YES"], ["yes"], ["yes"]]

    assert top_k_accuracy(results, answers, [1, 2, 5]) == {1: 0.25, 2: 0.5, 5: 0.5}
    assert top_k_accuracy([["carpet"]], [["^car"]], [1], holds=has_pattern) == {1: 1.0}
    assert top_k_accuracy([], [], [1]) == {1: 0.0}
    with pytest.raises(ValueError, match="shorter"):
        top_k_accuracy([["a"]], [], [1])


@given(
    st.lists(st.lists(st.sampled_from(["a b", "b", "c"]), max_size=6), min_size=1, max_size=6),
    st.sampled_from(["a", "b", "c"]),
)
def test_more_texts_never_hold_less(results: list[list[str]], answer: str) -> None:
    """Top-k accuracy rises with k, up to the share of questions with any text that holds the answer."""
    reached = list(top_k_accuracy(results, [[answer]] * len(results), range(1, 8)).values())

    assert reached == sorted(reached)
    assert reached[-1] == sum(any(answer in text.split() for text in texts) for texts in results) / len(results)


def test_acc_A05_open_exact_match() -> None:
    """
    Composed and decomposed spellings are one answer, which plain exact match tells apart.

    Inverse check: seen to fail without the decomposition.
    """
    assert open_exact_match("The Caf\u00e9.", "cafe\u0301") == 1.0
    assert exact_match("The Caf\u00e9.", "cafe\u0301") == 0.0
    assert open_exact_match("cafe", "caf\u00e9") == 0.0
    assert best_of(open_exact_match, "R\u00f6ntgen", ["x", "ro\u0308ntgen"]) == 1.0
