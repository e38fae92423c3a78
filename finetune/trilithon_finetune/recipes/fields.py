"""Checks of a row's fields that the recipes of encoder tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trilithon_finetune.data.findings import Finding, finding, nearest, shown
from trilithon_finetune.recipes.base import Output

Best = tuple[str, Literal["max", "min"]]
"""A metric, and whether more or less of it is better."""

_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


class RowCheck:
    """
    Collects what is wrong with one row.

    Args:
        prefix: stands before every path, for rows that lie deep in a document.
    """

    def __init__(self, row: Mapping[str, Any], *, file: str, line: int, prefix: str = "") -> None:
        self.row, self.findings = row, list[Finding]()
        self._file, self._line = file, line
        self._prefix = f"{prefix}." if prefix else ""

    def add(self, code: str, path: str, message: str, hint: str = "", *, below: int = 0) -> None:
        """Note a finding at `path` of the row, `below` lines under its first."""
        found = finding(code, message, file=self._file, line=self._line + below, path=self._prefix + path, hint=hint)
        self.findings.append(found)

    def keys(self, allowed: Sequence[str], *, row: Mapping[str, Any] | None = None, path: str = "") -> None:
        """Note every key that is not one of `allowed`, in the row or in an object within it."""
        for key in self.row if row is None else row:
            if key not in allowed:
                hint = nearest(str(key), allowed).strip()
                name = f"{path}.{key}" if path else str(key)
                self.add("E-DATA-007", name, f"is unknown. Allowed: {', '.join(allowed)}.", hint)

    def value(self, path: str, kind: type, *, row: Mapping[str, Any] | None = None) -> Any:
        """The value at a path's last name if it is of this kind; else None, with a finding."""
        holder, key = self.row if row is None else row, path.rpartition(".")[2]
        if key not in holder:
            self.add("E-DATA-008", path, f"is missing. Give {_KINDS[kind]}.")
            return None
        value = holder[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.add("E-DATA-008", path, f"must be {_KINDS[kind]}. Given: {shown(value)}.")
            return None
        return value

    def text(self, path: str, *, row: Mapping[str, Any] | None = None) -> str | None:
        """Like `value` for a text, which must hold more than spaces."""
        value = self.value(path, str, row=row)
        if value is not None and not value.strip():
            self.add("E-DATA-015", path, "is empty.")
            return None
        return value if isinstance(value, str) else None


def unknown_label(label: str, allowed: Sequence[str], *, path: str, file: str, line: int) -> Finding:
    """The finding for a label that the training file does not have."""
    message = f"{shown(label)} is not a label of the training file. Allowed: {', '.join(allowed)}."
    return finding("E-DATA-008", message, file=file, line=line, path=path, hint=nearest(label, allowed).strip())


def label_findings(label: str, labels: Sequence[str], *, file: str, line: int) -> list[Finding]:
    """What is wrong with a row's label among those of the training file: unknown to it, or its only one."""
    if label not in labels:
        return [unknown_label(label, labels, path="label", file=file, line=line)]
    if len(labels) == 1:
        rule = f"every row of the training file has the label {shown(label)}: there is nothing to learn."
        return [finding("E-DATA-022", rule, file=file, line=line, path="label", hint="Add rows of another label.")]
    return []


def outputs_by_row(outputs: Sequence[Output]) -> dict[int, list[npt.NDArray[np.float32]]]:
    """Values of the samples of each row, by line and then by part."""
    rows: dict[int, list[npt.NDArray[np.float32]]] = {}
    for output in sorted(outputs, key=lambda item: (item.sample.row, item.sample.part)):
        rows.setdefault(output.sample.row, []).append(output.values)
    return rows
