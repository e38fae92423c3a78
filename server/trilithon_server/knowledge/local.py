"""
The knowledge of one conversation: sentences of the documents that belong to it, and the choice of those that the next
reply may use.

    base = LocalKnowledge(read_documents(documents))
    chosen = base.select(turns, Choice(scorer="tfidf", top_k=5))

What is chosen depends on the conversation so far and on nothing else: no scorer here sees the reply.

Shape legend: N sentences, M turns, H width of the vectors.

Source: arXiv 2010.10150; maximal marginal relevance (Carbonell and Goldstein 1998) against sentences that say the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.fusion import fuse
from trilithon_server.knowledge.html import LIMITS, PageLimits, read_html, read_text
from trilithon_server.knowledge.ranking import Ranking, best
from trilithon_server.knowledge.sentences import Sentence, sentences_of
from trilithon_server.knowledge.sparse import SparseIndex
from trilithon_server.knowledge.tfidf import Floats, TermCounts, TermVectors, unit
from trilithon_server.knowledge.words import search_words

Scorer = Literal["tfidf", "bm25", "dense", "hybrid"]
SCORERS: tuple[str, ...] = get_args(Scorer)

MIN_SCORES: dict[str, float] = {"tfidf": 0.05, "dense": 0.25, "bm25": 0.0, "hybrid": 0.0}
"""Below which a sentence has nothing to do with a conversation: cosines, and what shares no word."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """
    A text or an html page; exactly one of the two.

    Attributes:
        id: what answers call it; each once in a base.
        title: of the page by default.
        url: a label that is never opened.
    """

    id: str
    text: str | bytes = ""
    html: str | bytes = ""
    title: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """
    How sentences are chosen.

    Attributes:
        scorer: one of `SCORERS`; dense and hybrid need vectors.
        top_k: sentences at most, from 0.
        min_score: that a sentence must reach, and be above 0; None: what `MIN_SCORES` has. Of hybrid it is a sum of
            1 / (60 + rank), and its parts keep their own.
        relevance: above 0 and at most 1, how much the score counts against likeness to what is chosen already.
        turns: how many of the last ones are asked with, at least 1.
        decay: weight of a turn relative to the next one, above 0 and at most 1.
    Raises:
        InvalidArgument: `knowledge_invalid`.
    """

    scorer: Scorer = "tfidf"
    top_k: int = 5
    min_score: float | None = None
    relevance: float = 0.7
    turns: int = 2
    decay: float = 0.7

    def __post_init__(self) -> None:
        _require(self.scorer in SCORERS, f"scorer must be one of {', '.join(SCORERS)}. Given: {self.scorer!r}.")
        _require(self.top_k >= 0, f"top_k must be at least 0. Given: {self.top_k}.")
        finite = self.min_score is None or math.isfinite(self.min_score)
        _require(finite, f"min_score must be a finite number. Given: {self.min_score}.")
        _require(0 < self.relevance <= 1, f"relevance must be above 0 and at most 1. Given: {self.relevance}.")
        _require(self.turns >= 1, f"turns must be at least 1. Given: {self.turns}.")
        _require(0 < self.decay <= 1, f"decay must be above 0 and at most 1. Given: {self.decay}.")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sentence and its score by the scorer that chose it."""

    sentence: Sentence
    score: float


def read_documents(
    documents: Sequence[Document], *, field: str = "documents", limits: PageLimits = LIMITS
) -> tuple[Sentence, ...]:
    """
    The sentences of documents, in order; what an earlier document said word for word is left out.

    Args:
        field: of the request that holds them, for messages.
    Raises:
        InvalidArgument: as `read_html`; `knowledge_invalid`, an id is empty or taken, or a document has both text and
            html.
    """
    kept: dict[str, Sentence] = {}
    ids: set[str] = set()
    for i, document in enumerate(documents):
        name = f"{field}[{i}]"
        _require(bool(document.id), f"{name}.id must not be empty.")
        _require(document.id not in ids, f"{name}.id must be given once. Given twice: {document.id!r}.")
        _require(not (document.text and document.html), f"{name} must have text or html. Given: both.")
        ids.add(document.id)
        if document.html:
            page = read_html(document.html, field=f"{name}.html", limits=limits)
        else:
            page = read_text(document.text, field=f"{name}.text", limits=limits)
        title = document.title or page.title
        for sentence in sentences_of(page.text, document_id=document.id, title=title, url=document.url):
            kept.setdefault(sentence.text.casefold(), sentence)
    return tuple(kept.values())


class LocalKnowledge:
    """
    Sentences that can be chosen from; made once, asked at every turn, by several threads at once.

    The first question to BM25 builds its index: a third of a second for 10,000 sentences.

    Args:
        sentences: in document order.
        vectors_NH: of the sentences, by the encoder that makes those of the turns; None: dense and hybrid are refused.
    """

    def __init__(self, sentences: Sequence[Sentence], *, vectors_NH: Vectors | None = None) -> None:
        assert vectors_NH is None or (vectors_NH.ndim == 2 and len(vectors_NH) == len(sentences))
        self.sentences = tuple(sentences)
        self._vectors_NH = None if vectors_NH is None else unit(vectors_NH.astype(np.float64))
        self._counts = TermCounts([sentence.text for sentence in self.sentences])

    def select(self, turns: Sequence[str], choice: Choice, *, turn_vectors_MH: Vectors | None = None) -> list[Chosen]:
        """
        The sentences that go with a conversation, in document order; none where nothing does.

        Each round takes the sentence with the highest `relevance * score - (1 - relevance) * likeness`, of equal ones
        the earlier; likeness is the highest cosine with a sentence taken before. BM25 and fused scores count relative
        to the best.

        Args:
            turns: oldest first.
            turn_vectors_MH: one of each turn.
        Raises:
            InvalidArgument: `knowledge_invalid`, the scorer needs vectors that are not there.
        """
        asked = self._ask(turns, choice, turn_vectors_MH)
        scores_N = self._scores(asked, choice.scorer)
        least = MIN_SCORES[choice.scorer] if choice.min_score is None else choice.min_score
        # Compared as they are told, in 32 bits: a sentence reaches its own score, whatever the protocol.
        rows = np.flatnonzero((scores_N.astype(np.float32) >= np.float32(least)) & (scores_N > 0))
        is_cosine = choice.scorer in ("tfidf", "dense")
        value = choice.relevance * scores_N[rows] / (1.0 if is_cosine else scores_N.max(initial=np.finfo(float).tiny))
        likeness = np.zeros(len(rows))
        taken: list[int] = []
        for _ in range(min(choice.top_k, len(rows))):
            at = int(np.argmax(value - (1 - choice.relevance) * likeness))
            value[at] = -np.inf
            similar = self._similarities(asked, int(rows[at]))[rows]
            likeness = np.maximum(likeness, similar) if taken else similar
            taken.append(int(rows[at]))
        return [Chosen(self.sentences[row], float(scores_N[row])) for row in sorted(taken)]

    def scores(self, turns: Sequence[str], choice: Choice, *, turn_vectors_MH: Vectors | None = None) -> Floats:
        """What every sentence scores, float64[N]; arguments and errors as `select`."""
        return self._scores(self._ask(turns, choice, turn_vectors_MH), choice.scorer)

    def _ask(self, turns: Sequence[str], choice: Choice, turn_vectors_MH: Vectors | None) -> _Asked:
        last = turns[-choice.turns :]
        weights_M = choice.decay ** np.arange(len(last) - 1, -1, -1, dtype=np.float64)
        if choice.scorer in ("tfidf", "bm25"):
            return _Asked(turns=last, weights_M=weights_M, terms=self._counts.weighted(last))
        _require(
            self._vectors_NH is not None and turn_vectors_MH is not None,
            f"scorer {choice.scorer} needs vectors of the sentences and of the turns, which only a server with an "
            "encoder has. Ask for tfidf or bm25.",
        )
        assert self._vectors_NH is not None
        assert turn_vectors_MH is not None
        assert turn_vectors_MH.shape == (len(turns), self._vectors_NH.shape[1])
        return _Asked(
            turns=last, weights_M=weights_M, vectors_MH=unit(turn_vectors_MH[-choice.turns :].astype(np.float64))
        )

    def _scores(self, asked: _Asked, scorer: str) -> Floats:
        if not asked.turns or not self.sentences:
            return np.zeros(len(self.sentences))
        if scorer == "tfidf":
            assert asked.terms is not None
            return asked.terms.products(unit(asked.weights_M @ asked.terms.context))
        if scorer == "dense":
            assert self._vectors_NH is not None
            assert asked.vectors_MH is not None
            return self._vectors_NH @ unit(asked.weights_M @ asked.vectors_MH)
        if scorer == "bm25":
            return self._bm25(asked)
        rankings = []
        for part in ("dense", "bm25"):
            scores_N = self._scores(asked, part)
            rows = np.flatnonzero((scores_N >= MIN_SCORES[part]) & (scores_N > 0))
            rankings.append(best(scores_N[rows].astype(np.float32), len(self.sentences), rows=rows))
        return _spread(fuse(rankings, len(self.sentences)), len(self.sentences))

    def _bm25(self, asked: _Asked) -> Floats:
        """The turns' scores, weighted: each turn's words count as those of a query of their own."""
        total = np.zeros(len(self.sentences))
        if self._sparse is not None:
            rankings = self._sparse.search(asked.turns, len(self.sentences))
            for weight, ranking in zip(asked.weights_M, rankings, strict=True):
                total += weight * _spread(ranking, len(self.sentences))
        return total

    def _similarities(self, asked: _Asked, row: int) -> Floats:
        """Cosines of every sentence with one of them: by terms where terms chose, else by vectors."""
        if asked.terms is not None:
            return asked.terms.similarities(row)
        assert self._vectors_NH is not None
        cosines_N: Floats = self._vectors_NH @ self._vectors_NH[row]
        return cosines_N

    @cached_property
    def _sparse(self) -> SparseIndex | None:
        texts = [sentence.text for sentence in self.sentences]
        return SparseIndex.build(texts) if any(map(search_words, texts)) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    """The turns that count, what each weighs (the last one 1), and how they are compared with sentences."""

    turns: Sequence[str]
    weights_M: Floats
    terms: TermVectors | None = None
    vectors_MH: Floats | None = None


def _spread(ranking: Ranking, count: int) -> Floats:
    """Scores by row, 0 where the ranking has none."""
    scores = np.zeros(count)
    scores[ranking.rows] = ranking.scores
    return scores


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidArgument(message, code="knowledge_invalid")
