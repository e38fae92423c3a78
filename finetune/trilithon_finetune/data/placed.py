"""Rows of documents that are not JSON lines, with where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PlacedRow(dict[str, Any]):
    """
    A row of a document. Its place is no part of what it says: rows are compared without it.

    Attributes:
        line: where it begins, from 1, in a document of lines that no other row shares; 0 elsewhere.
        path: within a document that is one tree, `data[3].paragraphs[0].qas[1]`.
    """

    def __init__(self, values: Mapping[str, Any], *, line: int = 0, path: str = "") -> None:
        super().__init__(values)
        self.line, self.path = line, path
