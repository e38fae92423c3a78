"""
Questions answered from passages: an index of the server or documents of the request are searched, a reader answers.

    question -> search -> passages with log p(z|q) -> reader -> the answer, and what it stands on

That nothing was found is an answer too. Nothing here opens a url.

Source: arXiv 2101.00408.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trilithon.errors import FailedPrecondition, InvalidArgument
from trilithon_server.encoders import both_of, check_side, default_encoder, format_of
from trilithon_server.generation import NO_TOKENS, Timings, Usage
from trilithon_server.knowledge.local import Document
from trilithon_server.knowledge.version import Hit, Queries, search_passages
from trilithon_server.openqa_readers import (
    Evidence,
    Reading,
    as_written,
    read_apart,
    read_spans,
    read_together,
    write_answers,
)
from trilithon_server.retrieval import (
    MAX_QUERY_CHARS,
    Wanted,
    check_line,
    check_mode,
    check_sources,
    cut_documents,
    encode_passages,
    encode_queries,
    look_up,
    mode_of,
)
from trilithon_server.sampling import validate
from trilithon_server.sampling_rules import META_NAMES
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.validation import Violations, invalid, nearest

Reader = Literal["span", "joint", "individual", "causal"]
READERS: tuple[Reader, ...] = get_args(Reader)
"""Where neither reader nor model is named, the first of these that a served model is."""

_READ = {"span": read_spans, "joint": read_together, "individual": read_apart, "causal": write_answers}

MAX_TOP_K = 50
DEFAULT_TOP_K = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """
    A question, and where its answer may stand: the stored `index` or `documents`, not both.

    Attributes:
        top_k: passages that are read; 0: five.
        reader: empty: what the model is.
        mode: empty: dense.
        retriever: name of an encoder; empty: the index's own, for documents the first that is served.
        min_version: the oldest version of the index that will do; 0: any.
    """

    question: str
    index: str = ""
    documents: Sequence[Document] = ()
    top_k: int = 0
    reader: str = ""
    mode: str = ""
    retriever: str = ""
    min_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """
    An answer and what it stands on.

    Attributes:
        text: empty: nothing was found that answers the question.
        logprob: 0 where there is no answer.
        evidence: the passages that were read, best first.
        index_version: that was searched; 0: documents.
        is_cut_off: time ran out, and this is the best so far.
    """

    text: str
    logprob: float
    evidence: Sequence[Evidence]
    index_version: int
    usage: Usage
    timings: Timings
    model: ServedModel
    reader: Reader
    is_cut_off: bool


async def answer(
    service: Service,
    call: Call,
    model_name: str,
    asked: Asked,
    values: Mapping[str, Any],
    *,
    found: Violations | None = None,
) -> Answer:
    """
    The answer to a question.

    Args:
        model_name: the reader; empty: the first served model that can read so.
        values: parameters by JSON name; those of how to write are not for the reader `span`.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused, or an engine could not finish.
    """
    violations = found if found is not None else Violations()
    _check(asked, service, violations)
    violations.raise_if_any()
    model, reader = await _reader(service, call, model_name, asked, values)
    meta = {name: value for name, value in values.items() if name in META_NAMES}
    hits, version, searched = await _passages(service, call, asked, meta)
    reading = await _read(service, call, model, reader, asked.question, hits, values)
    usage = searched + reading.usage
    record = call.record  # each part told of itself alone
    record.prompt_tokens, record.generated_tokens = usage.prompt_tokens, usage.generated_tokens
    record.cached_tokens, record.model = usage.cached_tokens, model.label
    total_ms = 1000 * (time.monotonic() - call.arrived_s)
    return Answer(
        text=reading.text,
        logprob=reading.logprob,
        evidence=reading.evidence,
        index_version=version,
        usage=usage,
        timings=dataclasses.replace(reading.timings, total_ms=total_ms),
        model=model,
        reader=reader,
        is_cut_off=reading.is_cut_off,
    )


async def _reader(
    service: Service, call: Call, name: str, asked: Asked, values: Mapping[str, Any]
) -> tuple[ServedModel, Reader]:
    """The model that reads, and how."""
    wanted = asked.reader
    if not name:
        able = {reader_of(model): model.name for model in reversed(service.models.values())}
        name = next((able[kind] for kind in READERS if kind in able and wanted in ("", kind)), "")
    if not name:
        raise FailedPrecondition(
            f"no model is served that reads passages{f' as {wanted}' if wanted else ''}.",
            code="unsupported_model",
            hint="Serve one that generates text, an encoder that was finetuned for span_qa, or a reader.",
        )
    model = await service.resolve(name, call)
    reader = reader_of(model)
    if reader is None or wanted not in ("", reader):
        can = f"It reads as {reader}." if reader else f"It can: {', '.join(model.capabilities)}."
        rule = f"cannot read as {wanted}" if wanted else "cannot read passages"
        raise InvalidArgument(f"model `{model.name}` {rule}. {can} Name another model.", code="unsupported_model")
    # Before the search: its result decides whether a reader is asked at all, not whether a request is right.
    violations = Violations()
    for given in values if reader == "span" else ():
        if given not in META_NAMES:
            violations.add(given, "is for readers that write: a span is found, not drawn", given=values[given])
    params = validate(as_written(model, values), model.bounds(call.principal, model.ready()), violations)
    violations.raise_if_any()
    most = service.limits.max_prompts
    if (total := params.n * (asked.top_k or DEFAULT_TOP_K)) > most:
        raise invalid("n", f"times `top_k` must be at most {most}", given=total)
    return model, reader


def reader_of(model: ServedModel) -> Reader | None:
    """How a model reads passages; None: it was not made for that."""
    if model.is_seq2seq:
        return None if model.reader is None else model.reader.kind
    if "generate" in model.capabilities:
        return "causal"
    return "span" if "answer" in model.capabilities else None


async def _passages(
    service: Service, call: Call, asked: Asked, values: Mapping[str, Any]
) -> tuple[Sequence[Hit], int, Usage]:
    """The passages to read, best first; the version they are of; the tokens of the search."""
    top_k = asked.top_k or DEFAULT_TOP_K
    if asked.index:
        wanted = Wanted(
            index=asked.index,
            queries=[asked.question],
            top_k=top_k,
            mode=asked.mode,
            min_version=asked.min_version,
            encoder=asked.retriever,
        )
        found = await look_up(service, call, wanted, values)
        return found.hits[0], found.index_version, found.usage
    passages = await asyncio.to_thread(cut_documents, asked.documents)
    mode, usage, scale = mode_of(asked.mode), NO_TOKENS, 1.0
    queries, vectors_MH = Queries(texts=[asked.question]), None
    if asked.retriever or mode != "bm25":
        model = await service.resolve(asked.retriever or default_encoder(service), call)
        model.require("embed")
        if mode != "bm25":
            check_side(model, "passages")
            asker, _ = await both_of(service, call, model)
            known = await encode_passages(service, call, model, passages, values)
            question = await encode_queries(service, call, asker, [asked.question], values)
            queries = dataclasses.replace(queries, vectors_NH=question.vectors_NH)
            vectors_MH, scale = known.vectors_NH, format_of(model).score_scale
            usage = known.usage + question.usage
    hits = await asyncio.to_thread(
        search_passages, passages, queries, top_k, mode=mode, vectors_MH=vectors_MH, scale=scale
    )
    return hits[0], 0, usage


async def _read(
    service: Service,
    call: Call,
    model: ServedModel,
    reader: Reader,
    question: str,
    hits: Sequence[Hit],
    values: Mapping[str, Any],
) -> Reading:
    if not hits:
        nothing = Timings(queue_ms=0.0, prefill_ms=0.0, first_token_ms=0.0, decode_ms=0.0, total_ms=0.0)
        return Reading(text="", logprob=0.0, evidence=(), usage=NO_TOKENS, timings=nothing)
    return await _READ[reader](service, call, model, question, hits, values)


def _check(asked: Asked, service: Service, found: Violations) -> None:
    check_line("question", asked.question, MAX_QUERY_CHARS, found)
    check_sources("documents", asked.documents, found)
    if bool(asked.index) == bool(asked.documents):
        found.add("index", "or `documents` must be set, one of the two", code="missing_parameter")
    if asked.documents and asked.min_version:
        found.add("min_version", "must be unset with `documents`", given=asked.min_version)
    most = min(MAX_TOP_K, service.limits.max_prompts)
    if not 0 <= asked.top_k <= most:
        found.add("top_k", f"must be from 1 to {most}", given=asked.top_k)
    if asked.reader and asked.reader not in READERS:
        hint = nearest(asked.reader, READERS).strip()
        found.add("reader", f"must be one of {', '.join(READERS)}", given=asked.reader, todo=hint)
    check_mode(asked.mode, found)
