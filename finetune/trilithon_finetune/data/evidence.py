"""
The passages that a reader's retriever finds, read from a job's file: JSON lines `{"id", "title", "text"}`, or tsv with
the columns id, text and title under a line that names them, as DPR publishes its passages. No torch.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trilithon.errors import InvalidArgument
from trilithon_finetune.config import Section
from trilithon_finetune.errors import FinetuneError, JobError
from trilithon_finetune.recipes.openqa import ReaderOptions
from trilithon_finetune.setup import JobFile
from trilithon_server.knowledge.passages import Passage, check_passages, read_passages

HEADER = ("id", "text", "title")

KEPT_TOKENS = 65_536
"""Passages whose tokens a rank remembers, of the reader and of the retriever."""

MAX_PASSAGES = 1 << 24
"""Outputs that are kept to verify with name passages in fp32, which counts so far."""


@dataclass(frozen=True)
class EvidenceSize:
    """How many passages there are, and the bytes of their texts in memory."""

    passages: int = 0
    text_bytes: int = 0

    @classmethod
    def of(cls, passages: Sequence[Passage]) -> EvidenceSize:
        """Counted."""
        texts = (text for passage in passages for text in (passage.id, passage.title, passage.text))
        return cls(len(passages), sum(map(sys.getsizeof, texts)))


NO_EVIDENCE = EvidenceSize()


def read_evidence(job: JobFile) -> list[Passage]:
    """
    The passages of a job.

    Raises:
        FinetuneError: `invalid_config`, with everything that is wrong with the file.
    """
    assert job.passages_path is not None
    name = job.passages_name or job.passages_path.name
    try:
        if _is_tsv(job.passages_path):
            passages = _read_tsv(job.passages_path, name)
        else:
            passages = read_passages(job.passages_path, name=name, most=MAX_PASSAGES)
    except InvalidArgument as error:
        raise _invalid(error.message) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _invalid(f"{name} cannot be read: {error}.") from None
    if len(passages) > MAX_PASSAGES:
        raise _invalid(f"{name} must hold at most {MAX_PASSAGES:,} passages. Given: {len(passages):,}.")
    return passages


def check_evidence(passages: list[Passage], options: Section) -> None:
    """Raises FinetuneError: `invalid_config`, there are fewer passages than a question is answered from."""
    assert isinstance(options, ReaderOptions)
    if len(passages) < options.top_k:
        raise _invalid(f"it must hold at least options.top_k passages, {options.top_k}. Given: {len(passages)}.")


def _is_tsv(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(64).rstrip(b"\r\n") == b"\t".join(name.encode() for name in HEADER)


def _read_tsv(path: Path, name: str) -> list[Passage]:
    passages = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        next(rows)
        for row in rows:
            if len(row) != len(HEADER):
                columns = ", ".join(HEADER)
                message = f"{name}:{rows.line_num} must have {len(HEADER)} columns, {columns}. Given: {len(row)}."
                raise InvalidArgument(message, code="passages_invalid")
            passages.append(Passage(row[0], row[2], row[1]))
    check_passages(passages)
    return passages


def _invalid(message: str) -> FinetuneError:
    first, *rest = message.split("\n")
    error = JobError(code="invalid_config", message=f"options.passages: {first}", param="options.passages")
    return FinetuneError(error, findings=(first, *rest))
