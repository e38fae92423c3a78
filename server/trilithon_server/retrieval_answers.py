"""Answers of the retrieval calls as plain dictionaries, as `answers.py` makes those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trilithon_server import answers
from trilithon_server.knowledge.indexes import Facts
from trilithon_server.knowledge.version import Hit
from trilithon_server.retrieval import Encoded, Found
from trilithon_server.validation import float32


def encoded(result: Encoded) -> dict[str, Any]:
    """EncodeResponse"""
    return {
        "vectors": [{"values": row} for row in result.vectors_NH.tolist()],
        "model_digest": result.model_digest,
        "usage": answers.usage(result.usage),
        "model": result.model.name,
    }


def found(result: Found) -> dict[str, Any]:
    """SearchResponse"""
    return {
        "results": [{"passages": [passage(hit) for hit in hits]} for hits in result.hits],
        "index_version": result.index_version,
        "usage": answers.usage(result.usage),
        "model": "" if result.model is None else result.model.name,
    }


def passage(hit: Hit) -> dict[str, Any]:
    """Passage"""
    told = hit.passage
    return {"id": told.id, "score": hit.score, "title": told.title, "text": told.text, "logprob": hit.logprob}


def index(facts: Facts) -> dict[str, Any]:
    """Index"""
    manifest = facts.manifest
    return {
        "name": facts.name,
        "version": 0 if manifest is None else manifest.version,
        "passages": 0 if manifest is None else manifest.count,
        "model_digest": "" if manifest is None else manifest.encoder.model_digest,
        "state": facts.state,
        "progress": float32(facts.progress),
        "error": facts.error,
        "model": "" if manifest is None else manifest.encoder.model,
        "backend": "" if manifest is None else manifest.backend,
    }


def indexes(many: Sequence[Facts]) -> dict[str, Any]:
    """ListIndexesResponse"""
    return {"indexes": [index(facts) for facts in many]}
