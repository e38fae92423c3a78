"""
Round-trip consistency: a question is kept if a reader that sees it finds the answer that it was made for. No torch.

Source: arXiv 2002.09599, section 2.3 (question filtration, over-generation); arXiv 1906.05416 (round trips).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trilithon_server.tasks.answer_match import exact_match

Filter = Literal["pair_any", "single", "none"]
FILTERS: tuple[Filter, ...] = ("pair_any", "single", "none")
"""
`pair_any`: all questions of an answer are kept where any of them leads back to it. `single`: those that do. `none`: all
that can be read.
"""

Reason = Literal["", "too_long", "unreadable", "repeated", "no_answer", "other_answer", "answered"]
REASONS: tuple[Reason, ...] = ("too_long", "unreadable", "repeated", "no_answer", "other_answer", "answered")
"""
Why a question is dropped: its answer leaves no room for the text around it, so it was not asked for; it is none; the
same answer has it already; the reader finds no answer; it finds another one; it finds one where there should be none.
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """
    One question of an answer, and what a reader says.

    Attributes:
        question: None where what was written is none, or nothing was.
        too_long: the answer is, and nothing was written.
        reply: the reader's answer; None where it says that there is none, or was not asked.
        probability: of that answer, by the reader.
    """

    question: str | None
    too_long: bool = False
    reply: str | None = None
    probability: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a question is kept; if not, why."""

    kept: bool
    reason: Reason


def judge(answer: str, asked: Sequence[Asked], mode: Filter) -> list[Verdict]:
    """
    What becomes of the questions of one answer.

    >>> pair = [Asked("When?", reply="in 1066"), Asked("What?", reply="a battle")]
    >>> [verdict.kept for verdict in judge("In 1066", pair, "pair_any")]
    [True, True]
    >>> [verdict.reason for verdict in judge("In 1066", pair, "single")]
    ['', 'other_answer']

    Args:
        asked: all questions that were written for this answer.
    """
    own: list[Reason] = []
    for item, fault in zip(asked, _faults(asked, set()), strict=True):
        if fault or mode == "none":
            own.append(fault)
        elif item.reply is None:
            own.append("no_answer")
        else:
            own.append("" if exact_match(item.reply, answer) else "other_answer")
    if mode == "pair_any" and "" in own:
        own = ["" if reason in ("no_answer", "other_answer") else reason for reason in own]
    return [Verdict(not reason, reason) for reason in own]


def judge_unanswerable(asked: Sequence[Asked], mode: Filter, *, answerable: Sequence[Asked] = ()) -> list[Verdict]:
    """
    What becomes of questions that a text should not answer: each is kept where a reader finds no answer.

    >>> [verdict.reason for verdict in judge_unanswerable([Asked("Who?"), Asked("When?", reply="1066")], "pair_any")]
    ['', 'answered']

    Args:
        answerable: questions of the same answer that the text answers; one that is among them contradicts it.
    """
    found = _faults(asked, {item.question for item in answerable if item.question is not None})
    own: list[Reason] = [
        fault or ("" if mode == "none" or item.reply is None else "answered")
        for item, fault in zip(asked, found, strict=True)
    ]
    return [Verdict(not reason, reason) for reason in own]


def _faults(asked: Sequence[Asked], seen: set[str]) -> list[Reason]:
    """What is wrong with each question whatever a reader says; empty for nothing."""
    found: list[Reason] = []
    for item in asked:
        if item.question is None:
            found.append("too_long" if item.too_long else "unreadable")
            continue
        found.append("repeated" if item.question in seen else "")
        seen = {*seen, item.question}
    return found
