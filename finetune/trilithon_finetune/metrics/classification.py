"""Accuracy and F1 of single labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trilithon_finetune.metrics.scores import Scores


def class_scores(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, Scores]:
    """Scores of each label that occurs on either side, in the order of their names."""
    correct = Counter(label for label, other in zip(gold, predicted, strict=True) if label == other)
    found, wanted = Counter(predicted), Counter(gold)
    return {label: Scores(correct[label], found[label], wanted[label]) for label in sorted(found | wanted)}


def accuracy(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Share of equal labels; 0 for none at all."""
    return sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold) if gold else 0.0


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Mean F1 of the labels that occur on either side."""
    scores = class_scores(gold, predicted)
    return sum(score.f1 for score in scores.values()) / len(scores) if scores else 0.0


def positive_scores(gold: Sequence[str], predicted: Sequence[str], *, negative: str) -> Scores:
    """
    Scores over every label but the negative one, together: what finding no relation adds to is nothing.

    >>> positive_scores(["x", "false"], ["x", "false"], negative="false")
    Scores(correct=1, predicted=1, gold=1)

    Source: the evaluation of ChemProt (Krallinger et al. 2017), as BioBERT's re_eval.py has it.
    """
    scores = class_scores(gold, predicted)
    return sum((score for label, score in scores.items() if label != negative), start=Scores())
