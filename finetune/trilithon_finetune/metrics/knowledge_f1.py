"""
F1 of the words that a reply shares with a reference: with the knowledge it was given (KF1), or with the gold reply.

It is SQuAD's token F1 but for one thing: punctuation parts words instead of vanishing, so "well-known" is two words.

Source: ParlAI's F1 (Miller et al. 2017), as Wizard of Wikipedia has it (Dinan et al. 2019).
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from trilithon_finetune.metrics.squad import normalise, token_f1

_SPACES = str.maketrans(string.punctuation, " " * len(string.punctuation))


def word_f1(reply: str, reference: str) -> float:
    """
    F1 of shared words, as often as they occur, without articles; 0 where one has no words.

    >>> word_f1("The mill is well-known.", "a well known mill")
    0.8571428571428571
    """
    reply, reference = reply.translate(_SPACES), reference.translate(_SPACES)
    return token_f1(reply, reference) if normalise(reference) else 0.0


def mean_word_f1(replies: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the pairs whose reference has words; 0 for none."""
    kept = [
        word_f1(reply, reference)
        for reply, reference in zip(replies, references, strict=True)
        if normalise(reference.translate(_SPACES))
    ]
    return sum(kept) / len(kept) if kept else 0.0
