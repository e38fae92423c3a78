"""Rows that stand twice: within a file, under one id, or in the validation file too. Sixteen bytes are kept a row."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trilithon_finetune.data.findings import Finding, LineRanges, count_of, finding
from trilithon_finetune.data.judging import row_key
from trilithon_finetune.data.reading import LIMITS, Limits, Row, read_rows
from trilithon_finetune.recipes.base import Recipe

OVERLAP_ALLOWED = 0.01
"""Share of the validation rows that may stand in the training file too; more makes its numbers worthless."""


class RowKeys:
    """The keys of a file's rows, and those of their ids."""

    def __init__(self) -> None:
        self._keys, self._lines = array("Q"), array("Q")
        self._ids, self._id_lines, self._id_keys = array("Q"), array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, row: Row, key: int) -> None:
        """Note a row; `key` is its `row_key`."""
        self._keys.append(key)
        self._lines.append(row.line)
        if isinstance(name := row.value.get("id"), str | int):
            digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
            self._ids.append(int.from_bytes(digest, "big"))
            self._id_lines.append(row.line)
            self._id_keys.append(key)

    def repeated(self, *, file: str) -> Iterator[Finding]:
        """E-DATA-031 for rows that are the same, and for different rows with one id."""
        for lines in _groups(self._keys, self._lines):
            message = f"is written {len(lines)} times: {_text(lines)}."
            yield finding(
                "E-DATA-031", message, file=file, line=lines[0], hint="Remove the copies if they are not meant."
            )
        keys = dict(zip(self._id_lines, self._id_keys, strict=True))
        for lines in _groups(self._ids, self._id_lines):
            if len({keys[line] for line in lines}) > 1:
                message = f"is given to {len(lines)} rows: {_text(lines)}."
                yield finding("E-DATA-031", message, file=file, line=lines[0], path="id")

    def shared(
        self, validation: Path, recipe: Recipe, *, file: str, validation_file: str, limits: Limits = LIMITS
    ) -> Iterator[Finding]:
        """E-DATA-032 where rows of the validation file stand here too."""
        found = read_rows(validation, recipe=recipe, file=validation_file, limits=limits)
        theirs = np.asarray(array("Q", (row_key(item.value) for item in found if isinstance(item, Row))))
        ours = np.asarray(self._keys)
        lines = LineRanges()
        for line in np.asarray(self._lines)[np.isin(ours, theirs)].tolist():
            lines.add(line)
        if not lines:
            return
        both = int(np.isin(theirs, ours).sum())
        share = f"{count_of(both, 'row')} of it, {both / len(theirs):.1%}"
        message = f"stands in {validation_file} too ({share}): {lines.text()}."
        severe = both > OVERLAP_ALLOWED * len(theirs)
        yield finding(
            "E-DATA-032",
            message,
            file=file,
            line=lines.first,
            hint="Remove them from one of the two.",
            severity="error" if severe else "warning",
        )


def _groups(keys: array[int], lines: array[int]) -> Iterator[list[int]]:
    """Lines whose keys are equal, where there are several, by the first of them."""
    values = np.asarray(keys)
    order = np.argsort(values, kind="stable")
    bounds = np.flatnonzero(np.diff(values[order])) + 1
    starts, stops = np.concatenate([[0], bounds]), np.concatenate([bounds, [len(order)]])
    several = stops - starts > 1
    where = np.asarray(lines)
    groups = [where[order[a:b]].tolist() for a, b in zip(starts[several], stops[several], strict=True)]
    yield from sorted(groups)


def _text(lines: list[int]) -> str:
    ranges = LineRanges()
    for line in lines:
        ranges.add(line)
    return ranges.text()
