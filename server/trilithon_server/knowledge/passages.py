"""
Passages: the pieces of text that are looked up, and their file: JSON lines of `{"id", "title", "text"}`.

A file is read strictly and everything wrong with it is said at once, because a passage that is dropped in silence is
an answer that nobody will find.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from trilithon.errors import InvalidArgument
from trilithon_server.http.strict_json import parse_object
from trilithon_server.knowledge.words import PASSAGE_WORDS, chunks
from trilithon_server.validation import nearest, shown

MAX_ID_BYTES = 256
MAX_LINE_BYTES = 64 << 10
"""Of one line; a passage has some hundred words, and an encoder reads no more of it than some thousand characters."""

MAX_SHOWN = 20
"""Findings that a message lists; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Passage:
    """
    A piece of text.

    Attributes:
        id: 1 to 256 bytes of UTF-8, printable; each once in an index.
        title: of the document that it is from; may be empty.
        text: not blank.
    """

    id: str
    title: str
    text: str

    @property
    def searched(self) -> str:
        """What BM25 reads: title and text."""
        return f"{self.title} {self.text}"


_KEYS = tuple(field.name for field in fields(Passage))


def passages_of(
    document_id: str, title: str, text: str, *, words: int = PASSAGE_WORDS, most: int | None = None
) -> list[Passage]:
    """
    A document in passages of so many words, anew at each paragraph; their ids are `DOCUMENT_ID:NUMBER`, from 0.

    The same document gives the same ids, and two documents never share one.

    >>> [passage.id for passage in passages_of("d", "", "a b c", words=2)]
    ['d:0', 'd:1']

    Args:
        most: passages; the document's rest is not looked at. None: all.
    """
    pieces = chunks(text, words, most=most)
    return [Passage(f"{document_id}:{i}", title, piece.text) for i, piece in enumerate(pieces)]


def check_passage(passage: Passage) -> str:
    """What is wrong with a passage, as the end of a sentence; empty where nothing is."""
    for key in _KEYS:
        value = getattr(passage, key)
        if not isinstance(value, str):
            return f"{key} must be a string. Given: {shown(value)}."
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            return f"{key} must be Unicode text. Given: NUL, or half of a surrogate pair."
    if not 1 <= len(passage.id.encode()) <= MAX_ID_BYTES or not passage.id.isprintable():
        return f"id must have 1 to {MAX_ID_BYTES} bytes, all printable. Given: {shown(passage.id)}."
    if not passage.text.strip():
        return "text must not be blank."
    return ""


def check_size(passage: Passage) -> str:
    """What is wrong with the size of a passage, as the end of a sentence: its line must be one that is read again."""
    size = len(passage_line(passage))  # in JSON a control character has six bytes
    return "" if size <= MAX_LINE_BYTES else f"must have at most {MAX_LINE_BYTES:,} bytes as JSON. Given: {size:,}."


def passage_line(passage: Passage) -> bytes:
    """A passage as a line of the file."""
    return json.dumps(asdict(passage), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse_passage(line: bytes) -> Passage:
    """
    The passage of a line.

    Raises:
        InvalidArgument: `passages_invalid`; the message is the end of a sentence that begins with the line's place.
    """
    if len(line) > MAX_LINE_BYTES:
        raise InvalidArgument(f"must have at most {MAX_LINE_BYTES:,} bytes.", code="passages_invalid")
    try:
        values = parse_object(line.removesuffix(b"\n"))
    except InvalidArgument as error:
        raise InvalidArgument(error.message.removeprefix("the body "), code="passages_invalid") from None
    unknown = [key for key in values if key not in _KEYS]
    missing = [key for key in _KEYS if key not in values]
    if unknown:
        known = f"Allowed: {', '.join(_KEYS)}.{nearest(unknown[0], _KEYS)}"
        wrong = f"must not have the field {shown(unknown[0])}. {known}"
    elif missing:
        wrong = f"must have the field {shown(missing[0])}. Given: {', '.join(map(shown, values)) or 'no field'}."
    else:
        wrong = check_passage(Passage(**values))
    if wrong:
        raise InvalidArgument(wrong, code="passages_invalid")
    return Passage(**values)


def check_passages(passages: Iterable[Passage]) -> None:
    """
    Refuse passages that cannot be an index.

    Raises:
        InvalidArgument: `passages_invalid`, none at all, a malformed one, or an id that repeats; lists the findings.
    """
    findings = _Findings()
    seen: dict[str, str] = {}
    for i, passage in enumerate(passages):
        where = f"passages[{i}]"
        if wrong := check_passage(passage) or check_size(passage) or _repeated(passage, where, seen):
            findings.add(f"{where} {wrong}")
    findings.raise_if_any(what="an index", is_empty=not seen)


def read_passages(path: Path, *, name: str = "", most: int | None = None) -> list[Passage]:
    """
    The passages of a file in order.

    Args:
        name: what messages call the file; empty: its own name.
        most: lines that the file may have; what is behind them is not read. None: any number.
    Raises:
        InvalidArgument: `passages_invalid`, with file, line and value of everything that is wrong.
        OSError: the file cannot be read.
    """
    what = name or path.name
    passages: list[Passage] = []
    findings = _Findings()
    seen: dict[str, str] = {}
    for number, line in _lines(path):
        where = f"{what}:{number}"
        if most is not None and number > most:
            findings.add(f"{what} must hold at most {most:,} passages. Given: more lines. Make several files.")
            break
        try:
            passage = parse_passage(line)
        except InvalidArgument as error:
            findings.add(f"{where} {error.message}")
            continue
        if wrong := _repeated(passage, where, seen):
            findings.add(f"{where} {wrong}")
        passages.append(passage)
    findings.raise_if_any(what=what, is_empty=not passages)
    return passages


def write_passages(path: Path, passages: Iterable[Passage]) -> list[int]:
    """
    Write passages that `check_passages` accepts.

    Returns:
        The first byte of each line, and the size of the file.
    """
    offsets = [0]
    with path.open("wb") as file:
        for passage in passages:
            offsets.append(offsets[-1] + file.write(passage_line(passage)))
    return offsets


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; only a newline ends one. Of one that is too long the beginning."""
    with path.open("rb") as file:
        number = 1
        while line := file.readline(MAX_LINE_BYTES + 1):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            yield number, line
            number += 1


def _repeated(passage: Passage, where: str, seen: dict[str, str]) -> str:
    first = seen.setdefault(passage.id, where)
    return "" if first == where else f"id must not repeat. Given: {shown(passage.id)}, as in {first}."


class _Findings:
    """What is wrong: the first of it, and how much there is; a file may have no good line at all."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def add(self, finding: str) -> None:
        self._count += 1
        if self._count <= MAX_SHOWN:
            self._shown.append(finding)

    def raise_if_any(self, *, what: str, is_empty: bool) -> None:
        if is_empty and not self._count:
            self.add(f"{what} must hold at least one passage.")
        if self._count:
            more = [f"... and {self._count - MAX_SHOWN} more."] if self._count > MAX_SHOWN else []
            raise InvalidArgument("\n".join([*self._shown, *more]), code="passages_invalid")
