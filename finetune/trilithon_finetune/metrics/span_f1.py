"""
F1 of entities: one counts only where both ends and the type are right.

Source: the CoNLL-2003 evaluation in its strict reading of IOB2 tags (seqeval, `mode="strict"`).
"""

from __future__ import annotations

from collections.abc import Sequence

from trilithon_finetune.metrics.scores import Scores
from trilithon_server.tasks.tagging import spans_of


def span_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Scores]:
    """
    Scores of each entity type that occurs, in the order of their names.

    >>> span_scores([["B-x", "I-x", "O"]], [["B-x", "I-x", "B-x"]])
    {'x': Scores(correct=1, predicted=2, gold=1)}

    Args:
        gold, predicted: tags of the words of each text, as many on both sides.
    """
    scores: dict[str, Scores] = {}
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        assert len(gold_tags) == len(predicted_tags)
        wanted, found = set(spans_of(gold_tags)), set(spans_of(predicted_tags))
        for span in sorted(wanted | found):
            one = Scores(int(span in wanted and span in found), int(span in found), int(span in wanted))
            scores[span[2]] = scores.get(span[2], Scores()) + one
    return dict(sorted(scores.items()))


def micro(scores: dict[str, Scores]) -> Scores:
    """All types together."""
    return sum(scores.values(), start=Scores())
