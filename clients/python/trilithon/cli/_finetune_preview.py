"""A row as the model sees it: what is learned in colour on a terminal, between >> and << elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trilithon.cli._output import print_table, printable

if TYPE_CHECKING:
    from trilithon.cli._finetune_local import Shown


def show(samples: Sequence[Shown]) -> None:
    """Print every sample of a row: its text, then each token's label where it has one, or the answer of the whole."""
    for number, sample in enumerate(samples, 1):
        of = f", sample {number} of {len(samples)}" if len(samples) > 1 else ""
        print(f"line {sample.line}{of}: {len(sample.tokens)} tokens, {sample.num_learned} learned")
        if sys.stdout.isatty():
            _coloured(sample.pieces)
        else:
            print(marked(sample.pieces))
        if sample.answer:
            print(f"answer: {printable(sample.answer)}")
        labelled = [(token.text, token.label) for token in sample.tokens if token.label]
        if labelled:
            print_table(("token", "label"), labelled)


def marked(pieces: Sequence[tuple[str, bool]]) -> str:
    """
    The text of a sample, what is learned between >> and <<.

    >>> marked((("Hi\\n", False), ("Hello", True)))
    'Hi\\n>>Hello<<'
    """
    return "".join(f">>{_lines(text)}<<" if learned else _lines(text) for text, learned in pieces)


def _coloured(pieces: Sequence[tuple[str, bool]]) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for piece, learned in pieces:
        text.append(_lines(piece), style="bold green" if learned else "dim")
    Console(highlight=False, soft_wrap=True).print(text)


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
