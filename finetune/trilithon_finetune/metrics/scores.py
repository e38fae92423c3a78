"""Precision, recall and F1 from counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scores:
    """
    Counts of what was found.

    >>> Scores(correct=1, predicted=2, gold=4).f1
    0.3333333333333333

    Attributes:
        correct: predicted and gold.
        predicted, gold: how many there are of each.
    """

    correct: int = 0
    predicted: int = 0
    gold: int = 0

    @property
    def precision(self) -> float:
        """Share of the predicted ones that are right; 0 where nothing was predicted."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the gold ones that were found; 0 where there are none."""
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where both are."""
        return 2 * self.correct / (self.predicted + self.gold) if self.correct else 0.0

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.correct + other.correct, self.predicted + other.predicted, self.gold + other.gold)
