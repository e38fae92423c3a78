"""
Indexes of a folder, with an encoder in this process: what `retrieval` and `index_builds` do on a server.

    with LocalEncoder(model_dir, name="all-minilm-l6-v2") as encoder:
        build(IndexStore(folder), "walks", passages, encoder, created=0, told=print)

The vectors are those that a server makes of the same model: one format writes the texts, one engine reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import InvalidArgument
from trilithon_parallel.config import QUERY_DIR, load_config
from trilithon_server.knowledge.index import IndexStore
from trilithon_server.knowledge.live import Found
from trilithon_server.knowledge.manifest import Encoder
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.stored import Settings
from trilithon_server.knowledge.version import IndexVersion, Mode, Queries
from trilithon_server.llm import LLM
from trilithon_server.tasks import read_task
from trilithon_server.tasks.retrieval import RetrievalFormat

BATCH = 32
"""Texts that are encoded at once."""

Vectors = NDArray[np.float32]
Told = Callable[[int, int], None]
"""Called with how many of how many passages are encoded."""


class LocalEncoder:
    """
    An encoder of vectors. A context manager.

    Args:
        model_dir: of the encoder; of two, the one of passages, which has that of questions beside it.
        name: under which an index remembers it.
    Raises:
        InvalidArgument: `unsupported_model`, the model is no encoder, or of two the one of questions.
        ModelError: it cannot be loaded.
    """

    def __init__(self, model_dir: Path, *, name: str) -> None:
        config, task = load_config(model_dir), read_task(model_dir)
        if config.family != "bert":
            raise InvalidArgument(
                f"the encoder must be a model that gives vectors. Given: `{name}`, a {config.family} model.",
                code="unsupported_model",
                hint="Take an encoder, such as all-minilm-l6-v2.",
            )
        if isinstance(task, RetrievalFormat) and task.reads == "questions":
            raise InvalidArgument(
                f"the encoder must read passages. Given: `{name}`, one of two encoders, which reads questions alone.",
                code="unsupported_model",
                hint=f"Name the directory of both; this is its folder {QUERY_DIR}/.",
            )
        self._llm = self._asker = LLM(model_dir)
        hello = self._llm.hello
        if isinstance(task, RetrievalFormat):
            self.format = task
        else:
            self.format = RetrievalFormat.for_encoder(
                normalize=config.normalize, hidden_size=hello.hidden_size, max_context=hello.max_context_tokens
            )
        if self.format.reads == "passages":
            self._asker = LLM(model_dir / QUERY_DIR)
        self.facts = Encoder(
            model_digest=hello.model_digest,
            pooling="first" if config.pooling == "cls" else "mean",
            normalize=config.normalize,
            passage_format=self.format.passage_format,
            score_scale=self.format.score_scale,
            model=name,
        )

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors float32[N, H] of questions."""
        return self._vectors(self._asker, [self.format.query(text, self._llm.tokenizer).tokens for text in texts])

    def passages(self, passages: Sequence[Passage]) -> Vectors:
        """Vectors float32[M, H] of passages."""
        tokenizer = self._llm.tokenizer
        return self._vectors(self._llm, [self.format.passage(p.title, p.text, tokenizer).tokens for p in passages])

    def close(self) -> None:
        """Let go of the model; idempotent."""
        self._llm.close()
        self._asker.close()

    def __enter__(self) -> LocalEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _vectors(self, llm: LLM, sequences: Sequence[Sequence[int]]) -> Vectors:
        kind, unit = {"first": "FIRST", "mean": "MEAN", "last": "LAST"}[self.facts.pooling], self.facts.normalize
        rows: list[list[float]] = []
        for first in range(0, len(sequences), BATCH):  # the engine's queue has an end
            rows += llm.embed(sequences[first : first + BATCH], kind=kind, normalize=unit)
        return np.array(rows, np.float32)


def build(
    store: IndexStore,
    name: str,
    passages: Sequence[Passage],
    encoder: LocalEncoder,
    *,
    settings: Settings,
    created: int,
    told: Told,
) -> int:
    """
    Encode passages and publish the next version of an index, the first of a new name.

    Args:
        created: Unix seconds.
    Returns:
        The number of the version.
    Raises:
        InvalidArgument: `index_invalid`, `passages_invalid`.
        OSError: a file cannot be written.
    """
    parts: list[Vectors] = []
    for first in range(0, len(passages), BATCH):
        parts.append(encoder.passages(passages[first : first + BATCH]))
        told(min(first + BATCH, len(passages)), len(passages))
    vectors_MH = np.concatenate(parts)
    return store.publish(name, passages, vectors_MH, encoder=encoder.facts, created=created, settings=settings)


def stored(store: IndexStore, name: str) -> tuple[list[Passage], Settings]:
    """
    The passages of an index's current version, and how it is built.

    Raises:
        NotFound: `index_not_found`. DataLoss: `index_corrupt`. FailedPrecondition: `index_unsupported`.
    """
    index = _opened(store, name)
    passages = [index.passage(row) for row in range(index.manifest.count)]
    return passages, Settings(backend=index.manifest.backend)


def search(
    store: IndexStore, name: str, queries: Sequence[str], encoder: LocalEncoder | None, *, top_k: int, mode: Mode
) -> Found:
    """
    The passages that go with each question, and the version that they are of.

    Args:
        encoder: the one that built the index; None with `bm25`.
    Raises:
        FailedPrecondition: `index_encoder`, another encoder made the vectors; `index_unsupported`.
        NotFound: `index_not_found`. DataLoss: `index_corrupt`. InvalidArgument: `search_invalid`.
    """
    index = _opened(store, name)
    vectors_NH = None if encoder is None else encoder.queries(queries)
    digest = "" if encoder is None else encoder.facts.model_digest
    hits = index.search(Queries(texts=queries, vectors_NH=vectors_NH, model_digest=digest), top_k, mode=mode)
    return Found(tuple(hits), index.version)


def _opened(store: IndexStore, name: str) -> IndexVersion:
    return store.open(name, model_digest=store.manifest(name).encoder.model_digest)
