"""
CoNLL files: one `token<TAB>tag` a line, blank lines between sentences (CoNLL-2003, MTL-Bioinformatics-2016).

Further columns between the first and the last are left out, and so are `-DOCSTART-` lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.data.placed import PlacedRow


def read_conll(document: bytes, *, file: str) -> list[PlacedRow] | list[Finding]:
    """
    Sentences as rows `{"tokens", "tags"}` with the line of their first token; or what is wrong.

    >>> read_conll(b"In O\\ncolon B-Disease\\n", file="a.tsv")
    [{'tokens': ['In', 'colon'], 'tags': ['O', 'B-Disease']}]
    """
    try:
        text = document.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"byte {document[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
        return [finding("E-DATA-002", message, file=file, line=document.count(b"\n", 0, error.start) + 1)]
    rows: list[PlacedRow] = []
    broken: list[Finding] = []
    new = True
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.removesuffix("\r")
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            new = True
        elif len(columns) < 2:
            rule = f"must be a token and its tag with a tab between. Given: {shown(line)}."
            broken.append(finding("E-DATA-008", rule, file=file, line=number))
        else:
            if new:
                rows.append(PlacedRow({"tokens": [], "tags": []}, line=number))
            rows[-1]["tokens"].append(columns[0])
            rows[-1]["tags"].append(columns[-1])
            new = False
    return broken or rows


def without_shared(rows: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose tokens are no row of a validation: the NCBI disease corpus has five sentences on both sides."""
    seen = {tuple(row["tokens"]) for row in held_out}
    return [row for row in rows if tuple(row["tokens"]) not in seen]


def to_conll(rows: Sequence[Mapping[str, Any]]) -> str:
    """The file that `read_conll` reads; tokens must hold no tab and no line break."""
    pairs = (zip(row["tokens"], row["tags"], strict=True) for row in rows)
    return "\n".join("".join(f"{token}\t{tag}\n" for token, tag in row) for row in pairs)
