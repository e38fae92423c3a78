"""
Lists of answers: whether the first is right, whether one of the first five is, and how far up it stands.

Source: the factoid questions of BioASQ task B (strict accuracy, lenient accuracy, mean reciprocal rank).
"""

from __future__ import annotations

from collections.abc import Sequence

from trilithon_finetune.metrics.squad import normalise

LISTED = 5
"""Answers of a list that count, as BioASQ takes them."""


def first_right(answers: Sequence[str], golds: Sequence[str]) -> int | None:
    """The rank, from 1, of the first answer that equals a gold one after SQuAD's normalisation; None for none."""
    wanted = {normalise(gold) for gold in golds}
    return next((rank for rank, answer in enumerate(answers, start=1) if normalise(answer) in wanted), None)


def list_scores(questions: Sequence[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """
    Scores of questions, each with a list of answers, best first, and its gold ones.

    >>> list_scores([(["no", "yes"], ["yes"])])
    {'strict_accuracy': 0.0, 'lenient_accuracy': 1.0, 'mean_reciprocal_rank': 0.5}
    """
    ranks = [first_right(answers[:LISTED], golds) for answers, golds in questions]
    count = max(1, len(ranks))
    return {
        "strict_accuracy": sum(rank == 1 for rank in ranks) / count,
        "lenient_accuracy": sum(rank is not None for rank in ranks) / count,
        "mean_reciprocal_rank": sum(1 / rank for rank in ranks if rank is not None) / count,
    }
