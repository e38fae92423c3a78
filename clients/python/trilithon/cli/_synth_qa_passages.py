"""
Passages that a served decoder writes from titles, where there is no corpus to ask about.

    titles -> a passage of each in turn -> those that are long enough, don't repeat themselves, and are there once

A passage depends on the seed, its number and its title alone, so an interrupted run goes on with those that it would
have had.

Source: arXiv 2002.09599, section 2 (passages from a decoder, drawn from a nucleus).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trilithon import Client
from trilithon.cli._part_file import PartFile
from trilithon.cli._synth_qa_run import CorpusError, Document
from trilithon.errors import DeadlineExceeded

TOP_P = 0.96
MAX_REPEATED = 0.05
"""Share of a passage's runs of four words that may have stood there before."""
RUN = 4
MAX_TITLE_CHARS = 200
_LENGTH = ("max_tokens", "context_length")
REASONS = {
    "too_short": "have too few words",
    "repetitive": "repeat themselves",
    "duplicate": "stand there already",
}
"""Why passages are dropped, in words."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """
    What decides the passages, besides the model.

    Attributes:
        count: to be written, of the titles in turn.
        model: empty for the only one served.
        tokens: of a passage, at most. words: of one that is kept, at least.
    """

    titles: Sequence[str]
    count: int
    seed: int
    model: str = ""
    tokens: int = 320
    words: int = 50


@dataclass(frozen=True)
class Sieved:
    """Passages that are asked about, in the order of their titles, and how many were dropped, by reason."""

    corpus: list[Document]
    dropped: dict[str, int]


def read_titles(path: Path) -> list[str]:
    """
    One a line; empty lines are left out.

    Raises:
        CorpusError: there is none, or one is too long. OSError.
    """
    titles = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        title = " ".join(line.split())
        if len(title) > MAX_TITLE_CHARS:
            rule = f"must have at most {MAX_TITLE_CHARS} characters. Given: {len(title)}."
            raise CorpusError(f"{path.name}:{number} title: {rule}")
        titles += [title] if title else []
    if not titles:
        raise CorpusError(f"{path.name} holds no title. Write one a line.")
    return titles


def kept_passages(output: Path, writing: Writing, *, restart: bool) -> PartFile:
    """What an earlier run has written of these passages. Raises ResumeError: it was another one."""
    settings = {name: value for name, value in asdict(writing).items() if name != "words"}
    settings["titles"] = hashlib.sha256("\0".join(writing.titles).encode()).hexdigest()
    return PartFile(output.with_name(f"{output.name}.passages"), {"writing": settings}, restart=restart)


def write_passages(
    client: Client, writing: Writing, kept: PartFile, batch: int, told: Callable[[int], None]
) -> list[str]:
    """
    The texts of all passages, by number.

    Args:
        batch: passages that are written at once.
        told: is called with the number of passages that are done.
    Raises:
        TrilithonError: the server refused or failed, or its time passed in the middle of a passage; what was done is
            kept. ResumeError: another model writes now.
    """

    def write(number: int) -> tuple[str, str]:
        options: dict[str, Any] = {"model": writing.model} if writing.model else {}
        answer = client.generate(
            f"{writing.titles[number % len(writing.titles)]}\n\n",
            temperature=1.0,
            top_p=TOP_P,
            seed=seed_of(writing.seed, number),
            max_tokens=writing.tokens,
            **options,
        )
        if answer[0].finish_reason == "time_limit":  # kept, it would not be what the seed draws
            message = f"the time limit passed before passage {number + 1} was written. Run the command again."
            raise DeadlineExceeded(message, code="timeout", hint="Raise --timeout where that does not help.")
        return answer.model, passage_of(answer[0].text, is_cut=answer[0].finish_reason in _LENGTH)

    told(len(kept.pieces))
    with ThreadPoolExecutor(batch) as pool:
        for first in range(len(kept.pieces), writing.count, batch):
            numbers = range(first, min(first + batch, writing.count))
            for number, (model, text) in zip(numbers, pool.map(write, numbers), strict=True):
                kept.begin({"passage_model": model})
                kept.add({"number": number, "text": text})
                told(number + 1)
    return [piece["text"] for piece in kept.pieces]


def passage_of(text: str, *, is_cut: bool) -> str:
    """
    What was written, in one line; of what was cut off, the whole sentences.

    >>> passage_of("It was late.\\n\\nThe mill stood st", is_cut=True)
    'It was late.'
    """
    line = " ".join(text.split())
    ends = [found.end() for found in re.finditer(r"[.!?][\"')\]]*(?=\s|$)", line)]
    return line[: ends[-1] if ends else 0] if is_cut else line


def sieve(texts: Sequence[str], writing: Writing) -> Sieved:
    """Keep what can be asked about; each passage that is dropped counts under the first reason."""
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    kept: list[tuple[int, int, str]] = []
    for number, text in enumerate(texts):
        reason = "duplicate" if text in seen else _fault(text, writing.words)
        if reason:
            dropped[reason] += 1
            continue
        seen.add(text)
        kept.append((number % len(writing.titles), number, text))
    corpus = [Document(str(number + 1), text, writing.titles[title]) for title, number, text in sorted(kept)]
    return Sieved(corpus, dict(dropped))


def _fault(text: str, fewest: int) -> str:
    words = text.split()
    if len(words) < fewest:
        return "too_short"
    return "repetitive" if repeated_share(words) > MAX_REPEATED else ""


def repeated_share(words: Sequence[str]) -> float:
    """
    Share of the runs of four words that have stood there before, whatever their case.

    >>> repeated_share("a b c d e".split()), repeated_share("A b c d a b c d".split())
    (0.0, 0.2)
    """
    lower = [word.lower() for word in words]
    runs = list(zip(*(lower[first:] for first in range(RUN)), strict=False))
    return (len(runs) - len(set(runs))) / len(runs) if runs else 0.0


def seed_of(seed: int, number: int) -> int:
    """Of one passage; from 0 to 2**63 - 1."""
    digest = hashlib.sha256(f"{seed}\0passage\0{number}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
