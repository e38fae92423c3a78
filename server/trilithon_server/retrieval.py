"""
Vectors of questions and passages, and searches of the indexes that the server keeps.

    question -> `RetrievalFormat` -> encoder engine -> vector -> the index's version -> passages

The encoder of a search is the one that built the version that is searched: another one's vectors mean nothing there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import FailedPrecondition, InvalidArgument
from trilithon_server.dialogue_requests import MAX_DOCUMENTS, check_documents
from trilithon_server.embedding import embed
from trilithon_server.encoders import check_side, default_encoder, encoder_of, format_of, space_of
from trilithon_server.generation import NO_TOKENS, Usage
from trilithon_server.knowledge.html import read_html, read_text
from trilithon_server.knowledge.indexes import Indexes
from trilithon_server.knowledge.local import Document
from trilithon_server.knowledge.passages import MAX_ID_BYTES, Passage, check_size, passages_of
from trilithon_server.knowledge.version import Hit, IndexVersion, Mode, Queries
from trilithon_server.prompts import Sequenced
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_run import off_loop
from trilithon_server.validation import Violations, is_text, nearest, shown

MODES: tuple[str, ...] = get_args(Mode)
MAX_QUERIES = 64
MAX_TOP_K = 1000
MAX_FOUND = 8192
"""Passages of one answer, over all of its questions."""

MAX_FOUND_BYTES = 12 << 20
"""Of those passages; twice as many as they have with 100 words each, and less than a gRPC message may have."""

DEFAULT_TOP_K = 10
MAX_QUERY_CHARS = 4096

MAX_CUT = 1 << 14
"""Passages that documents are cut into: those of 1 MiB, if a paragraph has 64 bytes."""

MAX_DOCUMENT_ID_BYTES = MAX_ID_BYTES - len(f":{MAX_CUT - 1}")
"""Its passages have it in their own ids."""

MAX_TITLE_CHARS = 512
"""Of a document: each of its passages repeats it."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Vectors float32[N, H], the encoder that made them, and the digest of the one that made what they compare with."""

    vectors_NH: Vectors
    model: ServedModel
    model_digest: str
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """
    What is looked for.

    Attributes:
        top_k: passages for each question at most; 0: ten.
        mode: empty: dense.
        min_version: the oldest version that will do; 0: any.
        encoder: its name; empty: the one that built the index.
    """

    index: str
    queries: Sequence[str]
    top_k: int = 0
    mode: str = ""
    min_version: int = 0
    encoder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """For each question its passages, all of one version; `model` is None where words alone were compared."""

    hits: Sequence[tuple[Hit, ...]]
    index_version: int
    model: ServedModel | None
    usage: Usage

    @property
    def chars(self) -> int:
        """Of all passages."""
        return sum(len(hit.passage.title) + len(hit.passage.text) for hits in self.hits for hit in hits)


async def encode(
    service: Service,
    call: Call,
    model_name: str,
    texts: Sequence[str],
    role: Literal["query", "passage", ""],
    values: Mapping[str, Any],
    *,
    titles: Sequence[str] = (),
    found: Violations | None = None,
) -> Encoded:
    """
    Vectors of texts, as the encoder's format writes them.

    Args:
        texts: 1 to `limits.max_embedding_inputs`.
        values: parameters by JSON name; those of the request itself matter here.
        titles: of the passages; empty = none.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    violations = found if found is not None else Violations()
    model = await service.resolve(model_name or default_encoder(service), call)
    model.require("embed")
    if role in ("query", "passage"):
        check_side(model, "questions" if role == "query" else "passages")
    most = service.limits.max_embedding_inputs
    if not 1 <= len(texts) <= most:
        violations.add("texts", f"must hold from 1 to {most} texts", given=len(texts))
    for i, text in enumerate(texts[:most]):
        check_line(f"texts[{i}]", text, model.max_context * service.limits.max_prompt_chars_per_token, violations)
    if role not in ("query", "passage"):
        violations.add("role", "must be query or passage", given=role or None, code="missing_parameter")
    if titles and (role != "passage" or len(titles) != len(texts)):
        violations.add("titles", "must be as many as `texts`, and only of passages", given=len(titles))
    for i, title in enumerate(titles[:most]):
        if not is_text(title):
            violations.add(f"titles[{i}]", "must be sound Unicode (it holds half of a surrogate pair)")
    violations.raise_if_any()
    if role == "query":
        return await encode_queries(service, call, model, texts, values)
    passages = [Passage("", title, text) for title, text in zip(titles or [""] * len(texts), texts, strict=True)]
    return await encode_passages(service, call, model, passages, values)


async def encode_queries(
    service: Service, call: Call, model: ServedModel, texts: Sequence[str], values: Mapping[str, Any]
) -> Encoded:
    """Vectors of questions."""
    form, tokenizer = format_of(model), model.tokenizer
    sequences = await off_loop(sum(map(len, texts)), lambda: [form.query(text, tokenizer).tokens for text in texts])
    return await _vectors(service, call, model, sequences, values)


async def encode_passages(
    service: Service, call: Call, model: ServedModel, passages: Sequence[Passage], values: Mapping[str, Any]
) -> Encoded:
    """Vectors of passages, any number: as many at once as one request may have."""
    form, tokenizer = format_of(model), model.tokenizer
    sequences = await off_loop(
        sum(len(p.title) + len(p.text) for p in passages),
        lambda: [form.passage(p.title, p.text, tokenizer).tokens for p in passages],
    )
    return await _vectors(service, call, model, sequences, values)


async def _vectors(
    service: Service, call: Call, model: ServedModel, sequences: Sequence[Sequence[int]], values: Mapping[str, Any]
) -> Encoded:
    rows: list[Sequence[float]] = []
    tokens, digest = 0, space_of(model)
    most = min(service.limits.max_embedding_inputs, service.limits.max_queue_requests)
    for first in range(0, len(sequences), most):
        part = [Sequenced(ids=ids) for ids in sequences[first : first + most]]
        _, embeddings, usage = await embed(service, call, model.name, part, values)
        rows += [embedding.values for embedding in embeddings]
        tokens += usage.prompt_tokens
    call.record.prompt_tokens = tokens
    told = Usage(prompt_tokens=tokens, generated_tokens=0, cached_tokens=0)
    return Encoded(vectors_NH=np.array(rows, np.float32), model=model, model_digest=digest, usage=told)


async def search(
    service: Service, call: Call, wanted: Wanted, values: Mapping[str, Any], *, found: Violations | None = None
) -> Found:
    """
    The passages of an index that go with each question.

    Args:
        values: parameters by JSON name; those of the request itself matter here.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    violations = found if found is not None else Violations()
    _check(wanted, violations)
    violations.raise_if_any()
    return await look_up(service, call, wanted, values)


async def look_up(service: Service, call: Call, wanted: Wanted, values: Mapping[str, Any]) -> Found:
    """`search` of what was checked."""
    mode, top_k = mode_of(wanted.mode), wanted.top_k or DEFAULT_TOP_K
    live = await kept_indexes(service).live(call.principal.tenant, wanted.index)
    with live.reading(min_version=wanted.min_version) as index:
        encoded = await _encoded(service, call, index, wanted, mode, values)
        queries = Queries(
            texts=wanted.queries,
            vectors_NH=None if encoded is None else encoded.vectors_NH,
            model_digest="" if encoded is None else encoded.model_digest,
        )
        hits = await asyncio.to_thread(index.search, queries, top_k, mode=mode, most_bytes=MAX_FOUND_BYTES)
        usage = NO_TOKENS if encoded is None else encoded.usage
        model = None if encoded is None else encoded.model
        return Found(hits=hits, index_version=index.version, model=model, usage=usage)


async def _encoded(
    service: Service, call: Call, index: IndexVersion, wanted: Wanted, mode: Mode, values: Mapping[str, Any]
) -> Encoded | None:
    """The questions' vectors; a named encoder must be the index's own, also where words alone are compared."""
    model = None
    if wanted.encoder or mode != "bm25":
        model = await encoder_of(service, call, index.manifest, wanted.encoder, "questions")
    if model is None or mode == "bm25":
        return None
    return await encode_queries(service, call, model, wanted.queries, values)


def kept_indexes(service: Service) -> Indexes:
    """
    Raises:
        FailedPrecondition: `store_missing`, this server keeps nothing.
    """
    if service.indexes is None:
        raise FailedPrecondition(
            "this server keeps no indexes: it has no store.",
            code="store_missing",
            hint="Set server.store to a folder.",
        )
    return service.indexes


def check_sources(name: str, documents: Sequence[Document], found: Violations) -> None:
    """`check_documents`, and that ids and titles are such as passages may have."""
    check_documents(name, documents, found)
    for i, document in enumerate(documents[:MAX_DOCUMENTS]):
        if document.id and not (document.id.isprintable() and len(document.id.encode()) <= MAX_DOCUMENT_ID_BYTES):
            rule = f"must have at most {MAX_DOCUMENT_ID_BYTES} bytes, all printable"
            found.add(f"{name}[{i}].id", rule, given=document.id)
        if len(document.title) > MAX_TITLE_CHARS:
            given = len(document.title)
            found.add(f"{name}[{i}].title", f"must have at most {MAX_TITLE_CHARS} characters", given=given)


def cut_documents(documents: Sequence[Document]) -> list[Passage]:
    """
    Documents in passages of 100 words, in order; what is around a page's article is left out, and a page's own title is
    cut where it is too long.

    Args:
        documents: as `check_sources` lets them pass.
    Raises:
        InvalidArgument: as `read_html`; `knowledge_invalid`, an id that repeats; `passages_invalid`, no word at all,
            too many passages, or too large a one.
    """
    seen: set[str] = set()
    passages: list[Passage] = []
    for i, document in enumerate(documents):
        field = f"documents[{i}]"
        if document.id in seen:
            message = f"{field}.id must be given once. Given twice: {shown(document.id)}."
            raise InvalidArgument(message, code="knowledge_invalid")
        seen.add(document.id)
        if document.html:
            page = read_html(document.html, field=f"{field}.html")
        else:
            page = read_text(document.text, field=f"{field}.text")
        title = document.title or page.title[:MAX_TITLE_CHARS]
        cut = passages_of(document.id, title, page.text, most=MAX_CUT + 1 - len(passages))
        if wrong := next(filter(None, map(check_size, cut)), ""):
            hint = "Put spaces between its words, or empty lines: a passage has up to 100 words of one paragraph."
            raise InvalidArgument(f"{field}: a passage {wrong}", code="passages_invalid", hint=hint)
        passages += cut
        if len(passages) > MAX_CUT:
            message = f"the documents must make at most {MAX_CUT:,} passages. Given: more, in {field}."
            hint = "Send fewer of them, or longer paragraphs: an empty line ends a passage."
            raise InvalidArgument(message, code="passages_invalid", hint=hint)
    if not passages:
        raise InvalidArgument("the documents must hold at least one word.", code="passages_invalid")
    return passages


def mode_of(mode: str) -> Mode:
    """The mode of a name that was checked."""
    return "bm25" if mode == "bm25" else "hybrid" if mode == "hybrid" else "dense"


def check_mode(mode: str, found: Violations) -> None:
    """That it is one, or empty."""
    if mode and mode not in MODES:
        found.add("mode", f"must be one of {', '.join(MODES)}", given=mode, todo=nearest(mode, MODES).strip())


def check_line(name: str, text: str, most: int, found: Violations) -> None:
    """That a text says something, and is not larger than anything that is read of it."""
    if not text.strip():
        found.add(name, "must not be empty", given=text, code="empty_prompt")
    elif not is_text(text):
        found.add(name, "must be sound Unicode (it holds half of a surrogate pair)")
    elif len(text) > most:
        found.add(name, f"must have at most {most} characters", given=len(text), code="prompt_too_long")


def _check(wanted: Wanted, found: Violations) -> None:
    if not wanted.index:
        found.add("index", "must be set", code="missing_parameter")
    if not 1 <= len(wanted.queries) <= MAX_QUERIES:
        found.add("queries", f"must hold from 1 to {MAX_QUERIES} questions", given=len(wanted.queries))
    for i, query in enumerate(wanted.queries[:MAX_QUERIES]):
        check_line(f"queries[{i}]", query, MAX_QUERY_CHARS, found)
    if not 0 <= wanted.top_k <= MAX_TOP_K:
        found.add("top_k", f"must be from 1 to {MAX_TOP_K}", given=wanted.top_k)
    elif (total := len(wanted.queries) * (wanted.top_k or DEFAULT_TOP_K)) > MAX_FOUND:
        found.add("top_k", f"times the number of `queries` must be at most {MAX_FOUND}", given=total)
    check_mode(wanted.mode, found)
