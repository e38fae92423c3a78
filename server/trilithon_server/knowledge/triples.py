"""
Files of facts: a fact a line, `relation<TAB>head<TAB>tail`, UTF-8.

They are read strictly and everything wrong with a file is said at once: a fact that is dropped in silence is one that
nobody will miss.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator
from pathlib import Path

from trilithon.errors import InvalidArgument
from trilithon_server.validation import nearest, shown

MAX_LINE_BYTES = 4096

MAX_SHOWN = 20
"""Findings that a message lists; the rest are counted."""

Triple = tuple[str, str, str]
"""Relation, head, tail."""


def read_triples(path: Path, *, relations: Collection[str]) -> list[Triple]:
    """
    The facts of a file in order, as they stand there.

    Args:
        relations: that are known.
    Raises:
        InvalidArgument: `triples_invalid`, with the lines that are wrong; the file has none at all.
        OSError: the file cannot be read.
    """
    triples: list[Triple] = []
    findings: list[str] = []
    for number, line in _lines(path):
        found = _parse(line, relations)
        if isinstance(found, str):
            findings.append(f"{path.name}:{number} {found}")
        else:
            triples.append(found)
    if not triples and not findings:
        findings.append(f"{path.name} must hold at least one fact.")
    if findings:
        more = [f"... and {len(findings) - MAX_SHOWN:,} more."] if len(findings) > MAX_SHOWN else []
        raise InvalidArgument(
            "\n  ".join([f"{path.name} has lines that are no facts:", *findings[:MAX_SHOWN], *more]),
            code="triples_invalid",
            hint="A line is a relation, a head and a tail with a tab between two.",
        )
    return triples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; only a newline ends one. Of one that is too long the beginning."""
    with path.open("rb") as file:
        file.seek(len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
        number = 1
        while line := file.readline(MAX_LINE_BYTES + 2):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")
            number += 1


def _parse(line: bytes, relations: Collection[str]) -> Triple | str:
    """The fact of a line, or what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        return f"must have at most {MAX_LINE_BYTES:,} bytes. Given: more."
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return f"must be UTF-8. Given: 0x{line[error.start]:02x} at byte {error.start + 1} of the line."
    parts = text.split("\t")
    if len(parts) != 3:
        return f"must have 3 fields. Given: {len(parts)}."
    relation, head, tail = (part.strip() for part in parts)
    for name, value in (("relation", relation), ("head", head), ("tail", tail)):
        if not value or not value.isprintable():
            return f"{name} must be printable text. Given: {shown(value)}."
    if relation not in relations:
        return f"relation {shown(relation)} is not one that has a sentence.{nearest(relation, relations)}"
    return relation, head, tail
