"""
Published data sets as rows of the recipes, cut into what to learn from and what to judge by.

Where a set comes without a split, every fifth of its units is held out: a unit is what must not stand on both sides
(an article, an abstract, a document), so that nothing learned is asked for again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trilithon_finetune.converters.conll import read_conll
from trilithon_finetune.converters.dialogues import begin_rows, persona_rows, topical_rows
from trilithon_finetune.converters.dpr import dpr_rows, read_passage_lines
from trilithon_finetune.converters.drugprot import Labels, read_drugprot, relation_rows
from trilithon_finetune.converters.pubtator import read_pubtator, tagging_rows
from trilithon_finetune.converters.pushshift import blocked_of, pushshift_rows
from trilithon_finetune.converters.questions import fairytale_rows, json_lines, pubmedqa_row, span_row
from trilithon_finetune.converters.squad import read_squad
from trilithon_finetune.data.findings import Finding, Findings
from trilithon_finetune.data.placed import PlacedRow

Row = Mapping[str, Any]
T = TypeVar("T")

HELD_OUT = 5
"""One unit of so many is held out: the first, the sixth ..."""
MAX_FINDINGS = 20
"""Of lines that could not be read: the first ones are told, and all are counted."""


@dataclass(frozen=True, slots=True)
class Split:
    """
    Rows to train on and rows to validate with; the second are none where a set has its own validation file.

    `dropped`: how much of the file was left out, by reason. `findings`: the first lines of it that could not be read.
    """

    train: tuple[Row, ...]
    dev: tuple[Row, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Converter:
    """
    A published form of data.

    Attributes:
        task: that its rows are for. about: what it reads, in words.
        read: from the files to rows.
        num_files: how many they may be.
    """

    task: str
    about: str
    read: Callable[..., Split]
    num_files: tuple[int, ...] = (1,)


def split_every_fifth(rows: Iterable[T], *, unit: Callable[[T], Hashable] | None = None) -> tuple[list[T], list[T]]:
    """
    Rows to train on and rows held out.

    >>> split_every_fifth("aabbccddeeff", unit=str)
    (['b', 'b', 'c', 'c', 'd', 'd', 'e', 'e'], ['a', 'a', 'f', 'f'])

    Args:
        unit: what a row belongs to; units count in the order in which they first appear. None: each row is its own.
    """
    numbers: dict[Hashable, int] = {}
    sides: tuple[list[T], list[T]] = [], []
    for i, row in enumerate(rows):
        key = i if unit is None else unit(row)
        sides[numbers.setdefault(key, len(numbers)) % HELD_OUT == 0].append(row)
    return sides


def _conll(document: bytes) -> Split:
    return Split(tuple(_sound(read_conll(document, file=""))))


def _pubtator(document: bytes) -> Split:
    sides = split_every_fifth(read_pubtator(document))
    train, dev = (tuple(row for item in side for row in tagging_rows(item)) for side in sides)
    return Split(train, dev)


def _drugprot(labels: Labels) -> Callable[[bytes], Split]:
    def read(document: bytes) -> Split:
        sides = split_every_fifth(read_drugprot(document))
        train, dev = (tuple(row for item in side for row in relation_rows(item, labels)) for side in sides)
        return Split(train, dev)

    return read


def _squad(document: bytes) -> Split:
    rows = read_squad(document, file="")
    if rows is None:
        raise ValueError("a SQuAD file must be one JSON object with a list `data`.")
    train, dev = split_every_fifth(_sound(rows), unit=lambda row: row.path.partition(".")[0])
    return Split(tuple(train), tuple(dev))


def _dpr(document: bytes, passages: bytes) -> Split:
    rows = read_squad(document, file="")
    if rows is None:
        raise ValueError("the first file must be one JSON object with a list `data`, as SQuAD's.")
    dropped: Counter[str] = Counter()
    made = dpr_rows(_sound(rows), read_passage_lines(passages), dropped)
    train, dev = split_every_fifth(made, unit=lambda item: item[0].partition(".")[0])
    return Split(tuple(row for _, row in train), tuple(row for _, row in dev), _counted(dropped))


def _qed(document: bytes) -> Split:
    train, dev = split_every_fifth(json_lines(document))
    return Split(tuple(map(span_row, train)), tuple(map(span_row, dev)))


def _covidqa(document: bytes) -> Split:
    train, dev = split_every_fifth(json_lines(document), unit=lambda row: str(row["document_id"]))
    return Split(tuple(map(span_row, train)), tuple(map(span_row, dev)))


def _pubmedqa(document: bytes) -> Split:
    train, dev = split_every_fifth(json_lines(document))
    return Split(tuple(map(pubmedqa_row, train)), tuple(map(pubmedqa_row, dev)))


def _fairytaleqa(questions: bytes, stories: bytes) -> Split:
    dropped: Counter[str] = Counter()
    rows = tuple(fairytale_rows(questions, stories, dropped))
    return Split(rows, dropped=_counted(dropped))


def _dialogues(rows: Callable[[bytes, Counter[str]], Iterable[tuple[str, Row]]]) -> Callable[[bytes], Split]:
    def read(document: bytes) -> Split:
        dropped: Counter[str] = Counter()
        train, dev = split_every_fifth(list(rows(document, dropped)), unit=lambda item: item[0])
        return Split(tuple(row for _, row in train), tuple(row for _, row in dev), _counted(dropped))

    return read


def _pushshift(document: bytes, unwanted: bytes = b"") -> Split:
    dropped: Counter[str] = Counter()
    findings = Findings(MAX_FINDINGS)
    train, dev = pushshift_rows(document, dropped, findings, blocked_of(unwanted))
    return Split(tuple(train), tuple(dev), _counted(dropped), findings.first)


def _counted(dropped: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in dropped.most_common() if count}


def _sound(rows: Iterable[PlacedRow | Finding]) -> list[PlacedRow]:
    sound = []
    for row in rows:
        if isinstance(row, Finding):
            raise ValueError(f"line {row.line} {row.path}: {row.message}")
        sound.append(row)
    return sound


CONVERTERS: Mapping[str, Converter] = {
    "conll": Converter("ner", "token<TAB>tag lines (MTL-Bioinformatics-2016, CoNLL-2003)", _conll),
    "pubtator": Converter("ner", "abstracts with mentions by characters; held out: every fifth abstract", _pubtator),
    "drugprot": Converter("relation", "DrugProt in 5 groups; held out: every fifth abstract", _drugprot("chemprot5")),
    "drugprot13": Converter("relation", "DrugProt; held out: every fifth abstract", _drugprot("drugprot13")),
    "squad": Converter("span_qa", "SQuAD 1.1, 2.0 and XQuAD; held out: every fifth article", _squad),
    "dpr": Converter(
        "dpr",
        "SQuAD's questions, then their passages as JSON lines; hard negatives by BM25; held out: every fifth article",
        _dpr,
        num_files=(2,),
    ),
    "qed": Converter("span_qa", "QED as JSON lines; held out: every fifth question", _qed),
    "covidqa": Converter("span_qa", "COVID-QA as JSON lines; held out: every fifth document", _covidqa),
    "persona_chat": Converter(
        "dialogue", "Persona-Chat as JSON lines; held out: every fifth dialogue", _dialogues(persona_rows)
    ),
    "topical_chat": Converter(
        "grounded_dialogue", "Topical-Chat with its reading sets; held out: every fifth", _dialogues(topical_rows)
    ),
    "begin": Converter(
        "grounded_dialogue", "BEGIN, attributable replies; held out: every fifth knowledge", _dialogues(begin_rows)
    ),
    "pushshift": Converter(
        "dialogue",
        "comments of the Pushshift schema, then, if at all, blocked words and r/communities, one a line; held out: the "
        "last fifth of the submissions",
        _pushshift,
        num_files=(1, 2),
    ),
    "fairytaleqa": Converter(
        "question_gen", "FairytaleQA: the questions, then the stories, as JSON lines", _fairytaleqa, num_files=(2,)
    ),
    "pubmedqa": Converter("classify", "PubMedQA as JSON lines; held out: every fifth question", _pubmedqa),
}
"""Converter by name."""


def convert(name: str, *documents: bytes) -> Split:
    """
    Rows of a published data set.

    Args:
        name: of `CONVERTERS`.
        documents: its files, as many as the form has.
    Raises:
        ValueError: no such converter, another number of files, or a file is not of this form.
    """
    if name not in CONVERTERS:
        raise ValueError(f"a converter must be one of {', '.join(CONVERTERS)}. Given: {name!r}.")
    if len(documents) not in (numbers := CONVERTERS[name].num_files):
        wanted = f"{' or '.join(map(str, numbers))} file{'s' * (numbers[-1] > 1)}"
        raise ValueError(f"{name} is read from {wanted}. Given: {len(documents)}.")
    try:
        return CONVERTERS[name].read(*documents)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the file is not {name} data: {type(error).__name__} {error}.") from None
