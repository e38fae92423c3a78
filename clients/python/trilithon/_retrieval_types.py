"""What indexes hold, what searches find in them, and what questions are answered with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from trilithon._types import Timings, Usage, _Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector(_Answer):
    """Of one text."""

    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors(_Answer):
    """One `Vector` per text, and the encoder that made them."""

    vectors: tuple[Vector, ...] = ()
    model_digest: str = ""
    model: str = ""
    usage: Usage = field(default_factory=Usage)

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[Vector]:
        return iter(self.vectors)

    def __getitem__(self, index: int) -> Vector:
        return self.vectors[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage(_Answer):
    """
    A passage that was found.

    Attributes:
        id: its own in the index.
        score: inner product, BM25 or fused score, as it was searched.
        logprob: among the passages that were found for the question.
    """

    id: str = ""
    score: float = 0.0
    title: str = ""
    text: str = ""
    logprob: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits(_Answer):
    """The passages of one question, best first."""

    passages: tuple[Passage, ...] = ()

    def __len__(self) -> int:
        return len(self.passages)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.passages)

    def __getitem__(self, index: int) -> Passage:
        return self.passages[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResults(_Answer):
    """One `Hits` per question, all of one version of the index; `model` is empty where words alone were compared."""

    results: tuple[Hits, ...] = ()
    index_version: int = 0
    model: str = ""
    usage: Usage = field(default_factory=Usage)

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Hits]:
        return iter(self.results)

    def __getitem__(self, index: int) -> Hits:
        return self.results[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index(_Answer):
    """
    An index on the server.

    Attributes:
        version: that is served; 0: none yet. passages, model_digest, model, backend: of that version.
        state: building, ready, or failed (the first version could not be built, or what is kept cannot be read).
        progress: share of the passages that are encoded, 0 to 1.
        error: why the last build or refresh failed, or what is kept cannot be read.
    """

    name: str = ""
    version: int = 0
    passages: int = 0
    model_digest: str = ""
    state: str = ""
    progress: float = 0.0
    error: str = ""
    model: str = ""
    backend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexes(_Answer):
    """All indexes, by name."""

    indexes: tuple[Index, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence(_Answer):
    """
    A passage that was read.

    Attributes:
        retrieval_logprob: log p(passage | question), among those that were read.
        answer_logprob: of its own best span, or of the answer given this passage alone; None: not scored.
        start, end: of a span, characters [start, end) of the passage's text.
        candidate: what this passage alone answers; empty: nothing.
        truncated: its end was not read.
    """

    passage: Passage = field(default_factory=Passage)
    retrieval_logprob: float = 0.0
    answer_logprob: float | None = None
    start: int = 0
    end: int = 0
    candidate: str = ""
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAnswer(_Answer):
    """
    The answer to an open question.

    Attributes:
        answer: empty where `no_answer`: nothing was found that answers the question.
        logprob: log p(answer | question).
        evidence: the passages that were read, best first, where they were asked for.
        index_version: that was searched; 0: documents of the call.
        model, reader: who read, and how: span, joint, individual or causal.
        finish_reason: time_limit where time ran out, and this is the best so far; else empty.
    """

    answer: str = ""
    logprob: float = 0.0
    no_answer: bool = False
    evidence: tuple[Evidence, ...] = ()
    index_version: int = 0
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    model: str = ""
    reader: str = ""
    finish_reason: str = ""
