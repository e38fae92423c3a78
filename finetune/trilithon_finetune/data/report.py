"""What a check of a data file found, for machines (`to_json`) and for people (`text`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from trilithon_finetune.data.findings import Finding, count_of, line_form
from trilithon_finetune.recipes.base import IGNORE, Sample
from trilithon_parallel.tokenizer import Tokenizer

MAX_EXAMPLE_CHARS = 2000
"""Of an example in `text`; more is cut out of its middle."""


@dataclass(frozen=True, slots=True)
class Example:
    """
    A sample as the model sees it.

    Attributes:
        line: of its row.
        pieces: its text in order, and whether each piece is learned.
    """

    line: int
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Lengths:
    """Tokens per sample. `histogram[i]` counts samples of 2^i to 2^(i+1) - 1 tokens."""

    mean: float = 0.0
    median: int = 0
    p90: int = 0
    p99: int = 0
    longest: int = 0
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """
    Everything about a data file.

    Attributes:
        ok: whether a job may train on it.
        rows, usable_rows, bad_rows: `usable_rows` are what training gets.
        dropped_rows, truncated_rows: what `data.on_long` left out or shortened.
        errors, warnings: findings, all of them; `error_kinds`: how many codes the errors have.
        counts: findings by code.
        findings: the first ones, by line; where not all are kept, warnings give way to errors.
        format: of the rows.
        labels: of the task's head.
        samples, tokens, supervised_tokens: of the usable rows.
        packing_efficiency: how full bins of `data.max_tokens` become.
        template_digest: of the chat template; empty where the format needs none.
        data_digest: SHA-256 of the file.
        sample_lengths: tokens of each sample, in the file's order; not part of what is shown.
    """

    file: str
    task: str
    ok: bool
    rows: int
    usable_rows: int
    bad_rows: int
    dropped_rows: int
    truncated_rows: int
    errors: int
    error_kinds: int
    warnings: int
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]
    format: str
    labels: tuple[str, ...]
    samples: int
    tokens: int
    supervised_tokens: int
    max_tokens: int
    lengths: Lengths
    packing_efficiency: float
    template_digest: str
    data_digest: str
    examples: tuple[Example, ...]
    sample_lengths: Sequence[int] = field(default=(), repr=False)

    @property
    def supervised_share(self) -> float:
        """Of all tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    @property
    def summary(self) -> str:
        """
        One line: "3 errors (2 kinds) and 1 warning in 1,204 rows. 1,201 rows are usable. Nothing was dropped."
        """
        kinds = f" ({count_of(self.error_kinds, 'kind')})" if self.errors > 1 else ""
        found = f"{count_of(self.errors, 'error')}{kinds} and {count_of(self.warnings, 'warning')}"
        usable = "1 row is usable" if self.usable_rows == 1 else f"{self.usable_rows:,} rows are usable"
        changed = [
            f"{count_of(number, 'row')} {'was' if number == 1 else 'were'} {what} (data.on_long)"
            for number, what in ((self.dropped_rows, "dropped"), (self.truncated_rows, "shortened"))
            if number
        ]
        return f"{found} in {count_of(self.rows, 'row')}. {usable}. {' and '.join(changed) or 'Nothing was dropped'}."

    def lines(self, *, most: int = 20) -> list[str]:
        """
        The findings, one a line, then the summary.

        Args:
            most: findings that are shown, errors before warnings; 0 for all that were kept.
        """
        first = sorted(enumerate(self.findings), key=lambda item: item[1].severity != "error")
        shown = [item for _, item in sorted(first[:most] if most else first, key=lambda item: item[0])]
        more = self.errors + self.warnings - len(shown)
        return [*map(line_form, shown), *([f"... and {count_of(more, 'finding')} more."] if more else []), self.summary]

    def text(self, *, most: int = 20) -> str:
        """All of it for a terminal; learned text of the examples stands between >> and <<."""
        if not self.samples:
            return "\n".join(self.lines(most=most)) + "\n"
        lengths = self.lengths
        facts = [
            f"{self.format}: {count_of(self.samples, 'sample')} of {count_of(self.tokens, 'token')}, "
            f"{self.supervised_tokens:,} of them learned ({self.supervised_share:.1%}).",
            f"Tokens of a sample: mean {lengths.mean:.1f}, median {lengths.median:,}, 90% below {lengths.p90 + 1:,}, "
            f"99% below {lengths.p99 + 1:,}, longest {lengths.longest:,}.",
            f"Packed into bins of {self.max_tokens:,} tokens they fill {self.packing_efficiency:.1%}.",
            *([f"Template {self.template_digest}"] if self.template_digest else []),
            *([f"Labels: {', '.join(self.labels)}"] if self.labels else []),
        ]
        examples = [f"--- line {example.line}\n{_marked(example)}" for example in self.examples]
        return "\n".join([*self.lines(most=most), *facts, *examples]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """As routes and files carry it."""
        document = asdict(replace(self, sample_lengths=()))
        del document["lengths"]["histogram"], document["sample_lengths"]
        return {
            **document,
            "length_histogram": list(self.lengths.histogram),
            "supervised_share": self.supervised_share,
            "summary": self.summary,
            "findings": [asdict(item) for item in self.findings],
            "labels": list(self.labels),
            "examples": [
                {"line": item.line, "pieces": [{"text": text, "learned": learned} for text, learned in item.pieces]}
                for item in self.examples
            ],
        }


def lengths_of(lengths: Sequence[int]) -> Lengths:
    """
    >>> lengths_of([1, 2, 3, 4]).histogram
    (1, 2, 1)
    """
    if not len(lengths):
        return Lengths()
    values = np.sort(np.asarray(lengths))
    median, p90, p99 = (int(values[min(len(values) - 1, int(len(values) * share))]) for share in (0.5, 0.9, 0.99))
    histogram = np.bincount(np.frexp(values)[1] - 1)
    return Lengths(float(values.mean()), median, p90, p99, int(values[-1]), tuple(histogram.tolist()))


def example_of(sample: Sample, tokenizer: Tokenizer, *, causal: bool) -> Example:
    """
    A sample as text.

    Args:
        causal: targets are next tokens, so that a token is learned where the one before it has a target.
    """
    counts = [target != IGNORE for target in sample.targets] or [False] * len(sample.tokens)
    learned = [False, *counts[:-1]] if causal else counts
    pieces = []
    for flag, group in itertools.groupby(zip(sample.tokens, learned, strict=True), key=lambda item: item[1]):
        raw = b"".join(tokenizer.token_bytes(token) for token, _ in group)
        pieces.append((raw.decode("utf-8", errors="replace"), flag))
    return Example(sample.row, tuple(pieces))


def _marked(example: Example) -> str:
    text = "".join(f">>{text}<<" if learned else text for text, learned in example.pieces)
    if len(text) <= MAX_EXAMPLE_CHARS:
        return text
    half = MAX_EXAMPLE_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
