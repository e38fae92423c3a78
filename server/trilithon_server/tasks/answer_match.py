"""
How answers are compared: exact match after the normalisation of SQuAD. No torch.

Source: Rajpurkar et al. 2016, section 5.
"""

from __future__ import annotations

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """
    Lower case, without ASCII punctuation, articles and doubled spaces: how answers are compared.

    >>> normalise("The  Battle of  Hastings!")
    'battle of hastings'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(predicted: str, gold: str) -> float:
    """1 where both say the same, else 0."""
    return float(normalise(predicted) == normalise(gold))
