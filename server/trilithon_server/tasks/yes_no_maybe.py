"""
Questions whose answer is yes, no or maybe: the prompt, and three ways to go on, of which the likeliest is the answer.

    Context: Patients were followed for a year. Half of them recovered.
    Question: Does the treatment help?
    Answer (yes, no or maybe): maybe
"""

from __future__ import annotations

from collections.abc import Sequence

ANSWERS = ("yes", "no", "maybe")
"""In this order everywhere."""


def yes_no_prompt(question: str, contexts: Sequence[str] = ()) -> str:
    r"""
    What the model reads; it ends where the answer begins.

    >>> yes_no_prompt("Does it help?", ["Half recovered.", "Half did not."])
    'Context: Half recovered. Half did not.\nQuestion: Does it help?\nAnswer (yes, no or maybe):'
    """
    context = " ".join(text.strip() for text in contexts).strip()
    head = f"Context: {context}\n" if context else ""
    return f"{head}Question: {question.strip()}\nAnswer (yes, no or maybe):"


def yes_no_text(answer: str) -> str:
    """What the model writes behind a prompt for one of `ANSWERS`."""
    return f" {answer}"


def likeliest(logprobs: Sequence[float]) -> str:
    """
    The answer whose continuation is the likeliest; the earlier of `ANSWERS` on a tie.

    >>> likeliest([-2.0, -1.5, -3.0])
    'no'

    Args:
        logprobs: of the continuations, in the order of `ANSWERS`.
    """
    return ANSWERS[max(range(len(ANSWERS)), key=lambda i: logprobs[i])]
