"""
A corpus' way through a server, passage by passage, and what is kept of it on the way: an interrupted run goes on where
it stopped, with the triples that it would have had.

    corpus.jsonl -> requests of a few passages -> OUT.json.part (a line a passage) -> OUT.json (SQuAD 1.1)
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trilithon import Client, SynthQAOptions, SynthQAPassageDone, SynthQAStarted, SynthQATriple
from trilithon._synth_qa import Filter
from trilithon.cli._part_file import PartFile
from trilithon.errors import DeadlineExceeded

MAX_PASSAGES = 64
"""Of one request, the server's limit."""
MAX_CHARS = 200_000
"""Of one request's passages together, within the server's default limit."""
REASONS = {
    "too_long": "were not asked: the answer leaves no room for its text",
    "unreadable": "are no question",
    "repeated": "stand there already",
    "no_answer": "find no answer",
    "other_answer": "lead to another answer",
    "answered": "have an answer after all",
}
"""Why the server drops questions, in words."""
EXAMPLES = 2
"""Shown of each reason for which questions were dropped."""

Triple = Mapping[str, Any]


class CorpusError(ValueError):
    """A line of the corpus is no passage."""


@dataclass(frozen=True, slots=True)
class Document:
    """A line of the corpus; `id` is its own or its number."""

    id: str
    text: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the triples, besides the models."""

    seed: int
    answers: int
    questions: int
    unanswerable: int
    filter: Filter
    model: str = ""
    answer_model: str = ""
    reader_model: str = ""
    draw: SynthQAOptions = field(default_factory=SynthQAOptions)


def read_corpus(path: Path) -> list[Document]:
    """
    Passages of JSON lines: `{"text", "id"?, "title"?}`.

    Raises:
        CorpusError: with file, line and field. OSError.
    """
    documents: list[Document] = []
    seen: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            document = _document(line, number, f"{path.name}:{number}")
            if document.id in seen:
                raise CorpusError(f"{path.name}:{number} id: must be given once. Given: {document.id!r}.")
            seen.add(document.id)
            documents.append(document)
    if not documents:
        raise CorpusError(f"{path.name} holds no passage.")
    return documents


def _document(line: str, number: int, where: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where} is not JSON: {error}.") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise CorpusError(f'{where} text: must be a text. Write a line as {{"text": "...", "id": "..."}}.')
    for name in ("id", "title"):
        if name in row and not isinstance(row[name], str | int):
            raise CorpusError(f"{where} {name}: must be a text. Given: {row[name]!r}.")
    for name in ("text", "id", "title"):
        if not _is_sound(str(row.get(name, ""))):
            raise CorpusError(f"{where} {name}: must be sound Unicode (it holds half of a surrogate pair).")
    if len(row["text"]) > MAX_CHARS:
        raise CorpusError(f"{where} text: must have at most {MAX_CHARS} characters. Given: {len(row['text'])}.")
    return Document(str(row.get("id", number)), row["text"], str(row.get("title", "")))


def _is_sound(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which no file and no request can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Kept:
    """
    The passages that are done, in a file beside the output.

    Args:
        output: the file that is made in the end.
        corpus: its passages; settings: of the run. Both must be those of the earlier run, if there was one.
        restart: leave an earlier run aside.
    Raises:
        ResumeError: an earlier run was another one.
    """

    def __init__(self, output: Path, corpus: Sequence[Document], settings: Settings, *, restart: bool) -> None:
        texts = "\0".join(f"{document.id}\0{document.text}" for document in corpus)
        run = {"corpus": hashlib.sha256(texts.encode()).hexdigest(), "settings": asdict(settings)}
        self.file = PartFile(output.with_name(f"{output.name}.part"), run, restart=restart)
        self.triples: dict[str, list[Triple]] = {item["passage_id"]: item["triples"] for item in self.file.pieces}

    def begin(self, started: SynthQAStarted) -> None:
        """
        Hold the models against those of the earlier run; the first time, write them down.

        Raises:
            ResumeError: they are others.
        """
        names = ("question_model", "reader_model", "proposed_by")
        self.file.begin({name: str(getattr(started, name)) for name in names})

    def add(self, passage_id: str, triples: list[Triple]) -> None:
        """A passage is done."""
        self.file.add({"passage_id": passage_id, "triples": triples})
        self.triples[passage_id] = triples


def work(
    client: Client, corpus: Sequence[Document], kept: Kept, settings: Settings, batch: int, told: Callable[[int], None]
) -> None:
    """
    Ask about every passage that is not done.

    Args:
        batch: passages of a request, 1 to `MAX_PASSAGES`.
        told: is called with the number of passages that are done.
    Raises:
        TrilithonError: the server refused or failed; what was done is kept. ResumeError.
    """
    options: SynthQAOptions = {**settings.draw, "seed": settings.seed}
    if settings.model:
        options["model"] = settings.model
    while left := [document for document in corpus if document.id not in kept.triples]:
        part = next(_parts(left, batch))
        before = len(kept.triples)
        with client.synth_qa(
            [{"id": document.id, "text": document.text} for document in part],
            answers_per_passage=settings.answers,
            questions_per_answer=settings.questions,
            unanswerable_per_answer=settings.unanswerable or None,
            filter=settings.filter,
            answer_model=settings.answer_model or None,
            reader_model=settings.reader_model or None,
            **options,
        ) as stream:
            triples: list[Triple] = []
            for event in stream:
                if isinstance(event, SynthQAStarted):
                    kept.begin(event)
                elif isinstance(event, SynthQATriple):
                    triples.append({name: value for name, value in asdict(event).items() if name != "extra"})
                elif isinstance(event, SynthQAPassageDone):
                    kept.add(event.passage_id, triples)
                    triples = []
                    told(len(kept.triples))
        if len(kept.triples) == before:
            raise DeadlineExceeded("the server's time limit does not suffice for one passage.", code="timeout")


def _parts(documents: Sequence[Document], batch: int) -> Iterator[list[Document]]:
    """Runs of passages that one request may hold."""
    part: list[Document] = []
    for document in documents:
        if part and (len(part) == batch or sum(len(d.text) for d in part) + len(document.text) > MAX_CHARS):
            yield part
            part = []
        part.append(document)
    yield part


def squad(
    corpus: Sequence[Document], triples: Mapping[str, Sequence[Triple]], *, with_impossible: bool = False
) -> dict[str, Any]:
    """
    The kept questions as a SQuAD 1.1 document, or 2.0 where some have no answer: neighbouring passages of one title are
    an article; one without a title is an article by its id. Passages without a question are left out.
    """
    articles: list[dict[str, Any]] = []
    for document in corpus:
        kept = [item for item in triples[document.id] if item["kept"]]
        if not kept:
            continue
        title = document.title or document.id
        if not articles or articles[-1]["title"] != title:
            articles.append({"title": title, "paragraphs": []})
        questions = [
            {
                "id": f"{document.id}-{number}",
                "question": item["question"],
                **_answers(item, with_impossible=with_impossible),
            }
            for number, item in enumerate(kept)
        ]
        articles[-1]["paragraphs"].append({"context": document.text, "qas": questions})
    return {"version": "v2.0" if with_impossible else "1.1", "data": articles}


def _answers(item: Triple, *, with_impossible: bool) -> dict[str, Any]:
    spans = [{"text": item["answer"], "answer_start": item["answer_start"]}]
    if not with_impossible:
        return {"answers": spans}
    if item["is_impossible"]:
        return {"answers": [], "plausible_answers": spans, "is_impossible": True}
    return {"answers": spans, "is_impossible": False}


def summary(triples: Mapping[str, Sequence[Triple]]) -> dict[str, Any]:
    """How many questions there are, how many were kept, and why the others were not, with examples."""
    flat = [item for part in triples.values() for item in part]
    dropped = Counter(str(item["reason"]) for item in flat if not item["kept"])
    examples = {
        reason: [item for item in flat if not item["kept"] and item["reason"] == reason][:EXAMPLES]
        for reason, _ in dropped.most_common()
    }
    return {
        "passages": len(triples),
        "questions": len(flat),
        "kept": sum(bool(item["kept"]) for item in flat),
        "dropped": dict(dropped.most_common()),
        "examples": examples,
    }
