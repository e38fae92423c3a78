"""
Documents out of files: `.jsonl`, one row with a text each, and `.txt`, one document per file.

Files are read in blocks of whole rows, so that several processes can work on one file and a large one is never in
memory. Reading only cuts; `documents_of` looks at the rows and says what is wrong with each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trilithon_parallel.data.errors import MAX_SHOWN, raise_findings

ROW_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt",)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole rows of a file, or the whole of a text file; `first_line` counts from 1."""

    path: str
    first_line: int
    content: bytes

    @property
    def is_rows(self) -> bool:
        """Rows of JSON, rather than one document."""
        return self.path.endswith(ROW_SUFFIXES)


@dataclass
class Findings:
    """What is wrong with an input; the first are kept, all are counted."""

    total: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, *sentences: str) -> None:
        """Count findings, keeping as many as are shown."""
        self.total += len(sentences)
        self.shown += sentences[: MAX_SHOWN - len(self.shown)]

    def raise_any(self) -> None:
        """Raise one DataError (`data_rows`) that lists them; return when there are none."""
        raise_findings(
            "the input", self.shown, total=self.total, hint="Nothing was written. Repair or leave out these rows."
        )


def check_inputs(paths: Sequence[Path], findings: Findings) -> int:
    """The bytes of all inputs together; a finding for each that is not a readable .jsonl or .txt file."""
    total = 0
    for path in paths:
        if path.suffix not in (*ROW_SUFFIXES, *TEXT_SUFFIXES):
            allowed = ", ".join((*ROW_SUFFIXES, *TEXT_SUFFIXES))
            findings.add(f"{path} must end in one of {allowed}. Given: {path.suffix or 'no ending'}.")
        elif not path.is_file():
            findings.add(f"{path} is not a file.")
        elif not os.access(path, os.R_OK):
            findings.add(f"{path} cannot be read: permission denied.")
        else:
            total += path.stat().st_size
    return total


def read_blocks(path: Path, *, block_bytes: int) -> Iterator[Block]:
    """
    Cut a file into blocks of about so many bytes that end with a row; a text file is one block.

    Args:
        path: a file that `check_inputs` accepts.
        block_bytes: a longer row makes a longer block.
    """
    with path.open("rb") as file:
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        if path.suffix in TEXT_SUFFIXES:
            yield Block(str(path), 1, file.read())
            return
        line, rest = 1, b""
        while chunk := file.read(block_bytes):
            head, newline, tail = chunk.rpartition(b"\n")
            if not newline:
                rest += chunk
                continue
            content = rest + head + newline
            yield Block(str(path), line, content)
            line, rest = line + content.count(b"\n"), tail
        if rest:
            yield Block(str(path), line, rest)


def documents_of(block: Block, *, text_key: str, findings: Findings) -> list[str]:
    """
    The texts of a block, empty ones included; rows that are wrong become findings instead.

    Args:
        block: of `read_blocks`.
        text_key: the field of a row that holds the text.
    """
    if not block.is_rows:
        text = _decoded(block.content, block.path, block.first_line, findings)
        return [] if text is None else [text]
    texts = []
    for number, row in enumerate(block.content.split(b"\n"), start=block.first_line):
        if not row.strip():
            continue
        where = f"{block.path}:{number}"
        line = _decoded(row, block.path, number, findings)
        if line is None:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            findings.add(f"{where} must be one JSON object. Given: {_short(line)} ({error}).")
            continue
        if not isinstance(value, dict):
            findings.add(f"{where} must be a JSON object. Given: {_short(line)}.")
        elif text_key not in value:
            known = ", ".join(map(repr, list(value)[:8])) or "none"
            findings.add(f"{where} must have the field {text_key!r}. Given: the fields {known}.")
        elif not isinstance(text := value[text_key], str):
            findings.add(f"{where} {text_key} must be a string. Given: {_short(json.dumps(text))}.")
        elif _has_surrogate(text):
            findings.add(f"{where} {text_key} must be Unicode text. Given: half of a surrogate pair.")
        else:
            texts.append(text)
    return texts


def _decoded(content: bytes, path: str, line: int, findings: Findings) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        at = line + content.count(b"\n", 0, error.start)
        byte = error.start - (content.rfind(b"\n", 0, error.start) + 1)
        findings.add(f"{path}:{at} must be UTF-8. Given: the byte 0x{content[error.start]:02x} at byte {byte} of it.")
        return None


def _has_surrogate(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."
