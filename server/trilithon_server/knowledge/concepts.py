"""
What a server knows of concepts: a graph of facts, and opposites of words, read from one file or one folder.

    FOLDER/*.tsv     facts (`triples.py`), among them antonyms
    FOLDER/*.jsonl   synsets (`antonyms.py`), which tell parts of speech and synonyms

Files are read in the order of their names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.antonyms import WordRelations, read_synsets
from trilithon_server.knowledge.graph import ConceptGraph
from trilithon_server.knowledge.templates import templates
from trilithon_server.knowledge.triples import read_triples


class ConceptsError(ValueError):
    """The files are not usable; the message says which one and why."""


@dataclass(frozen=True)
class Concepts:
    """
    Attributes:
        name: what requests call it: the file's or folder's name, without a suffix.
        digest: SHA-256 (hex) of the files' names and bytes, in order.
    """

    name: str
    graph: ConceptGraph
    words: WordRelations
    digest: str


def read_concepts(path: Path) -> Concepts:
    """
    Read a file of facts, or a folder of facts and synsets.

    Raises:
        ConceptsError: there is no such file, no facts in the folder, or a file is broken or cannot be read.
    """
    facts, glosses = _files(path)
    try:
        triples = [triple for file in facts for triple in read_triples(file, relations=templates())]
        synsets = [synset for file in glosses for synset in read_synsets(file)]
        digest = _digest([*facts, *glosses])
    except InvalidArgument as error:
        raise ConceptsError(error.message) from None
    except OSError as error:
        raise ConceptsError(f"{error.filename} cannot be read: {error.strerror}.") from None
    return Concepts(path.stem, ConceptGraph(triples), WordRelations(triples, synsets), digest)


def concepts_digest(path: Path) -> str:
    """
    What `read_concepts` would give as the digest; the facts are not read.

    Raises:
        ConceptsError: there is no such file, no facts in the folder, or a file cannot be read.
    """
    facts, glosses = _files(path)
    try:
        return _digest([*facts, *glosses])
    except OSError as error:
        raise ConceptsError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Files of facts, and files of synsets."""
    if path.is_file():
        return [path], []
    facts = sorted(path.glob("*.tsv"))
    if not facts:
        raise ConceptsError(
            f"{path} must be a file of facts, or a folder with at least one *.tsv of them. Given: neither."
        )
    return facts, sorted(path.glob("*.jsonl"))


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
