"""
Questions that a decoder answers in its own words: the prompt, the answer behind it, and how an answer is read.

    Context: The miller counted 12 sacks.
    Question: How many sacks were there?
    Answer: 12

Recipes train with these functions and whoever asks the model prompts with them. Plain words, so that any decoder can be
asked, and an answer begins with a space, as tokenizers expect of a word.
"""

from __future__ import annotations

ANSWER_END = "\n"
"""An answer is one line; a model that doesn't say its end token goes on with another question."""


def answer_prompt(question: str, context: str = "") -> str:
    r"""
    What the model reads; it ends where the answer begins.

    >>> answer_prompt("How many?", "Twelve sacks.")
    'Context: Twelve sacks.\nQuestion: How many?\nAnswer:'
    """
    head = f"Context: {context.strip()}\n" if context.strip() else ""
    return f"{head}Question: {question.strip()}\nAnswer:"


def answer_text(answer: str) -> str:
    """What the model writes behind a prompt, up to its end token."""
    return f" {answer.strip()}"


def read_answer(text: str) -> str:
    """
    The answer in what the model wrote: its first line.

    >>> read_answer(" twelve \\nQuestion: And")
    'twelve'
    """
    return text.strip().partition(ANSWER_END)[0].strip()
