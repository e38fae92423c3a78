"""Answers of the synthetic questions' call as plain dictionaries, as `answers.py` makes those of the others."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from trilithon_server import answers
from trilithon_server.served import Call
from trilithon_server.synthesis import Synthesis
from trilithon_server.synthesis_records import PassageDone, Triple


def started(work: Synthesis, call: Call) -> dict[str, Any]:
    """SynthQAStarted"""
    return {
        "request_id": call.request_id,
        "seed": work.seed,
        "question_model": work.writer.model.name,
        "reader_model": work.reader_name,
        "proposed_by": work.proposed_by,
    }


def triple(item: Triple) -> dict[str, Any]:
    """SynthQATriple"""
    return {
        "passage_id": item.passage_id,
        "question": item.question,
        "answer": item.answer,
        "answer_start": item.start,
        "kept": item.kept,
        "p_answer": item.p_answer,
        "qa_prob": item.qa_probability,
        "qa_answer": item.qa_answer,
        "reason": item.reason,
        "is_impossible": item.is_impossible,
    }


def passage(item: PassageDone) -> dict[str, Any]:
    """SynthQAPassage"""
    return dataclasses.asdict(item)


def finished(work: Synthesis, call: Call) -> dict[str, Any]:
    """SynthQAFinished"""
    summary = work.summary
    return {
        "passages": summary.passages,
        "triples": summary.triples,
        "kept": summary.kept,
        "dropped": dict(sorted(summary.dropped.items())),
        "finish_reason": None if summary.is_complete else "time_limit",
        "usage": answers.usage(work.usage),
        "total_ms": round(1000 * (time.monotonic() - call.arrived_s), 3),
    }
