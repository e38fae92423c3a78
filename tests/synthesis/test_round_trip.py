"""Which questions are kept: the truth table of both filters, and of none."""

from __future__ import annotations

import pytest

from trilithon_server.tasks.answer_match import exact_match, normalise
from trilithon_server.tasks.round_trip import Asked, Filter, judge, judge_unanswerable

BACK, SAME = Asked("q1", reply="The 12 sacks!", probability=0.9), Asked("q2", reply="12 sacks", probability=0.6)
WRONG, SILENT, BROKEN = Asked("q3", reply="a miller", probability=0.4), Asked("q4"), Asked(None)
AGAIN, LONG = Asked("q1", reply="12 sacks", probability=0.9), Asked(None, too_long=True)

CASES: dict[str, tuple[list[Asked], dict[Filter, list[str]]]] = {
    "both": ([BACK, SAME], {"pair_any": ["", ""], "single": ["", ""], "none": ["", ""]}),
    "first": ([BACK, WRONG], {"pair_any": ["", ""], "single": ["", "other_answer"], "none": ["", ""]}),
    "second": ([WRONG, SAME], {"pair_any": ["", ""], "single": ["other_answer", ""], "none": ["", ""]}),
    "neither": (
        [WRONG, SILENT],
        {
            "pair_any": ["other_answer", "no_answer"],
            "single": ["other_answer", "no_answer"],
            "none": ["", ""],
        },
    ),
    "silent": ([SILENT, BACK], {"pair_any": ["", ""], "single": ["no_answer", ""], "none": ["", ""]}),
    "broken": ([BROKEN, BACK], {m: ["unreadable", ""] for m in ("pair_any", "single", "none")}),
    "broken, wrong": (
        [WRONG, BROKEN],
        {
            "pair_any": ["other_answer", "unreadable"],
            "single": ["other_answer", "unreadable"],
            "none": ["", "unreadable"],
        },
    ),
    "too long": ([LONG, LONG], {m: ["too_long", "too_long"] for m in ("pair_any", "single", "none")}),
    "twice": ([BACK, AGAIN], {m: ["", "repeated"] for m in ("pair_any", "single", "none")}),
}


@pytest.mark.parametrize("mode", ["pair_any", "single", "none"])
@pytest.mark.parametrize("case", CASES)
def test_acc_E03_the_truth_table(case: str, mode: Filter) -> None:
    """
    A pair is kept where either question leads back, or each on its own merit; what can't be read or stands there
    already never is. Inverse seen red: a pair kept only where both lead back.
    """
    asked, wanted = CASES[case]
    verdicts = judge("12 sacks", asked, mode)

    assert [verdict.reason for verdict in verdicts] == wanted[mode]
    assert [verdict.kept for verdict in verdicts] == [reason == "" for reason in wanted[mode]]


@pytest.mark.parametrize("mode", ["pair_any", "single", "none"])
def test_acc_E03_a_question_without_an_answer_must_find_none(mode: Filter) -> None:
    """
    Each on its own merit, whatever the mode: one that the reader answers is dropped, as is one that its text answers
    too by another question, and what can't be read. Inverse seen: those kept to which a reader replies.
    """
    asked = [SILENT, Asked("q5", reply="a miller"), Asked("q1"), BROKEN, SILENT, LONG]
    verdicts = judge_unanswerable(asked, mode, answerable=[BACK, BROKEN])
    answered = "" if mode == "none" else "answered"

    assert [verdict.reason for verdict in verdicts] == [
        "", answered, "repeated", "unreadable", "repeated", "too_long",
    ]  # fmt: skip
    assert [verdict.kept for verdict in verdicts] == [verdict.reason == "" for verdict in verdicts]


def test_answers_are_compared_as_squad_does() -> None:
    """Case, articles, ASCII punctuation and spaces aside; nothing else."""
    assert normalise(" The  12\tSacks. ") == "12 sacks"
    assert exact_match("an Ox", "ox")
    assert not exact_match("oxen", "ox")
