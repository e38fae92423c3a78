"""
Data files in, rows and findings out. `.jsonl` with one object a line, plain or gzip, is what every task takes; some
take documents of their own (SQuAD JSON, CoNLL) through their recipe.

Whatever the file is, no more than a block and a row are held: a row beyond the limit is counted, not kept, and reading
goes on at the next line. A compressed file may not expand without end.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from trilithon_finetune.data.findings import Finding, count_of, finding
from trilithon_finetune.data.placed import PlacedRow
from trilithon_finetune.data.strict_json import RowError, parse_row
from trilithon_finetune.recipes.base import Recipe

ROW_SUFFIXES = ("", ".jsonl", ".ndjson")
"""Names that end so, `.gz` left out, say JSON lines; a recipe is not asked about them."""

_TABLES = (".csv", ".xls", ".xlsx", ".parquet", ".arrow")
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
_SPACE = b" \t\r"


@dataclass(frozen=True)
class Limits:
    """
    What a file may be, in bytes.

    Attributes:
        row: of one row.
        document: of a file that is read whole.
        expanded: of a compressed file, expanded.
        ratio: of expanded to compressed, once `ratio_from` bytes came out; text shrinks by less than 30.
        block: what is read at once.
    """

    row: int = 4 << 20
    document: int = 64 << 20
    expanded: int = 8 << 30
    ratio: int = 200
    ratio_from: int = 16 << 20
    block: int = 1 << 20


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Row:
    """One object; `line` counts from 1: lines of the file, or rows of a document that is one tree."""

    line: int
    value: Mapping[str, Any]


OnBytes = Callable[[int], None]


def read_rows(
    path: Path,
    *,
    recipe: Recipe | None = None,
    file: str = "",
    limits: Limits = LIMITS,
    on_bytes: OnBytes | None = None,
) -> Iterator[Row | Finding]:
    """
    The rows of a data file in order, or in their place what is wrong with them; never raises for what a file holds.

    A finding with a line stands for one bad row, one without for the file, and then nothing follows.

    Args:
        recipe: asked about files whose name does not say JSON lines.
        file: the file's name for messages, and for what kind of file it is; by default that of the path.
        on_bytes: told how far the file was read, now and then.
    Raises:
        OSError: the file cannot be read.
    """
    file = file or path.name
    name = PurePath(file.removesuffix(".gz"))
    suffix = name.suffix.lower()
    if suffix in _TABLES:
        message = f"is a {suffix} file by its name, which is not read."
        yield finding("E-DATA-003", message, file=file, hint="Convert it to JSON lines: one object a line.")
        return
    try:
        if recipe is not None and suffix not in ROW_SUFFIXES:
            found = recipe.rows_of(_whole(path, limits), file=file)
            if found is not None:
                yield from _numbered(found, file)
                return
        yield from _json_lines(path, file, limits, on_bytes)
    except _FileError as error:
        yield finding(error.code, error.message, file=file, line=error.line)


class _FileError(Exception):
    """The file cannot be read on."""

    def __init__(self, code: str, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.code, self.message, self.line = code, message, line


def _numbered(found: Any, file: str) -> Iterator[Row | Finding]:
    """Rows of a document, by their own lines where they have some, or its findings."""
    if not len(found):
        yield finding("E-DATA-001", "has no rows.", file=file)
    for number, item in enumerate(found, start=1):
        line = (item.line if isinstance(item, PlacedRow) else 0) or number
        yield item if isinstance(item, Finding) else Row(line, item)


def _json_lines(path: Path, file: str, limits: Limits, on_bytes: OnBytes | None) -> Iterator[Row | Finding]:
    blanks: list[int] = []  # first and last of the empty lines since the last row
    empty = True
    for line, offset, content, size in _lines(_blocks(path, limits, on_bytes), limits.row):
        if content is not None and not content.strip(_SPACE):
            blanks = [blanks[0] if blanks else line, line]
            continue
        if blanks:
            # At the end of a file empty lines are nobody's mistake; before a row they are.
            run = f" ({count_of(blanks[1] - blanks[0] + 1, 'line')})" if blanks[1] > blanks[0] else ""
            yield finding("E-DATA-003", f"is empty{run}, not JSON.", file=file, line=blanks[0], hint="Remove it.")
            blanks = []
        empty = False
        if content is None:
            message = f"has {size:,} bytes, at most {limits.row:,} allowed."
            yield finding("E-DATA-005", message, file=file, line=line, hint="Split it, or shorten it.")
            continue
        try:
            yield Row(line, parse_row(content, offset=offset))
        except RowError as error:
            yield finding(error.code, error.message, file=file, line=line, path=error.path)
    if empty:
        yield finding("E-DATA-001", "has no rows.", file=file, hint="Give it one JSON object a line.")


def _lines(blocks: Iterator[bytes], most: int) -> Iterator[tuple[int, int, bytes | None, int]]:
    """
    Lines with their number, the place of their first byte, their content and size; content is None beyond `most`.

    Only a newline ends a line (U+2028 in a text does not), with the carriage return before it if there is one.
    """
    line, begin, pending, skipped = 1, 0, b"", 0
    first = True
    for block in blocks:
        start = 0
        if first:
            first = False
            if block.startswith(_UTF16):
                raise _FileError("E-DATA-002", "is UTF-16: byte 0 of the file is not UTF-8. Save it as UTF-8.")
            start = begin = len(_BOM) if block.startswith(_BOM) else 0
        while (end := block.find(b"\n", start)) >= 0:
            size = skipped + len(pending) + end - start
            yield line, begin, None if size > most else (pending + block[start:end]).removesuffix(b"\r"), size
            line, begin, pending, skipped, start = line + 1, begin + size + 1, b"", 0, end + 1
        rest = len(block) - start
        if skipped or len(pending) + rest > most:
            skipped, pending = skipped + len(pending) + rest, b""
        else:
            pending += block[start:]
    if skipped or pending:
        yield line, begin, None if skipped else pending.removesuffix(b"\r"), skipped + len(pending)


def _blocks(path: Path, limits: Limits, on_bytes: OnBytes | None = None) -> Iterator[bytes]:
    """The file in blocks, expanded where it is gzip, which its first bytes tell."""
    with path.open("rb") as stream:
        packed = stream.read(len(_GZIP)) == _GZIP
        stream.seek(0)
        blocks = _plain(stream.read, limits, on_bytes)
        yield from _expanded(blocks, limits) if packed else blocks


def _plain(read: Callable[[int], bytes], limits: Limits, on_bytes: OnBytes | None) -> Iterator[bytes]:
    position = 0
    while block := read(limits.block):
        position += len(block)
        if on_bytes is not None:
            on_bytes(position)
        yield block


def _expanded(blocks: Iterator[bytes], limits: Limits) -> Iterator[bytes]:
    """Gzip members, one behind another, block by block."""
    packed = unpacked = newlines = 0
    member = zlib.decompressobj(wbits=31)
    begun = False
    for block in blocks:
        packed += len(block)
        while block:
            if member.eof:
                member = zlib.decompressobj(wbits=31)
            begun = True
            try:
                out = member.decompress(block, limits.block)
            except zlib.error as error:
                message = f"is not sound gzip: {error} (line {newlines + 1})."
                raise _FileError("E-DATA-003", message) from None
            block = member.unused_data if member.eof else member.unconsumed_tail
            unpacked += len(out)
            newlines += out.count(b"\n")
            if unpacked > limits.expanded or (unpacked > limits.ratio_from and unpacked > limits.ratio * packed):
                raise _FileError(
                    "E-DATA-005",
                    f"expands from {packed:,} bytes to more than {min(unpacked, limits.expanded):,}; at most "
                    f"{limits.expanded:,} and {limits.ratio} times are allowed. Compress less, or send it plain.",
                )
            if out:
                yield out
    if begun and not member.eof:
        raise _FileError("E-DATA-003", f"is not sound gzip: it breaks off in line {newlines + 1}.")


def _whole(path: Path, limits: Limits) -> bytes:
    parts, size = [], 0
    for block in _blocks(path, limits):
        size += len(block)
        if size > limits.document:
            message = f"has more than {limits.document:,} bytes, the most of a file that is read whole."
            raise _FileError("E-DATA-005", f"{message} Split it, or write JSON lines.")
        parts.append(block)
    return b"".join(parts)
