"""How good written questions and proposed answers are, against those of people."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trilithon_server.tasks.answer_match import normalise

_WORD = re.compile(r"\w+")


def rouge_l(written: str, gold: str) -> float:
    """
    F-measure of the longest common subsequence of words, from 0 to 1; 0 where either has no word.

    >>> rouge_l("How many sacks did he count?", "How many sacks were counted?")
    0.5454545454545454

    Source: Lin 2004, section 3.1, with beta = 1; words are runs of letters, digits and underscores in lower case.
    """
    ours, theirs = (_WORD.findall(text.lower()) for text in (written, gold))
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(ours) + len(theirs)) if row[-1] else 0.0


def proposal_recall(texts: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    """
    Of the different answers to all texts, how many were proposed.

    >>> proposal_recall([(["12 sacks", "a miller"], ["The 12 sacks", "12 sacks", "the river"])])
    0.5

    Args:
        texts: of each, what was proposed, and the answers there are.
    """
    found = total = 0
    for proposed, golds in texts:
        known = {normalise(text) for text in proposed}
        wanted = {normalise(text) for text in golds}
        found += len(wanted & known)
        total += len(wanted)
    return found / total if total else 0.0
