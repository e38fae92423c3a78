"""SynthQAService of `trilithon.api.v1`, over the functions that HTTP calls too."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from trilithon.api.v1 import synth_qa_pb2, synth_qa_pb2_grpc
from trilithon_server import synthesis, synthesis_answers
from trilithon_server.grpc import convert
from trilithon_server.grpc.gate import current_call
from trilithon_server.service import Service
from trilithon_server.synthesis_records import Passage, Triple, Wanted
from trilithon_server.tasks.round_trip import FILTERS
from trilithon_server.validation import Violations

_FILTERS = {
    synth_qa_pb2.SynthQARequest.FILTER_UNSPECIFIED: "",
    synth_qa_pb2.SynthQARequest.FILTER_PAIR_ANY: "pair_any",
    synth_qa_pb2.SynthQARequest.FILTER_SINGLE: "single",
    synth_qa_pb2.SynthQARequest.FILTER_NONE: "none",
}


class SyntheticQuestions(synth_qa_pb2_grpc.SynthQAServiceServicer):
    """SynthQAService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, request: synth_qa_pb2.SynthQARequest, context: Any
    ) -> AsyncIterator[synth_qa_pb2.SynthQAEvent]:
        """Triples of each passage, as they are made."""
        call, found = current_call(), Violations()
        if request.filter not in _FILTERS:
            found.add("filter", f"must be one of {', '.join(FILTERS)}", given=request.filter)
        values = convert.task_values(request)
        for name in synthesis.HIDDEN:
            if name in values:
                found.add(f"sampling.{name}", "must not be set: the task decides it", given=values.pop(name))
        wanted = Wanted(
            passages=[Passage(item.id, item.text) for item in request.passages],
            answers=request.answers_per_passage,
            questions=request.questions_per_answer,
            unanswerable=request.unanswerable_per_answer,
            filter=_FILTERS.get(request.filter, ""),
            answer_model=request.answer_model,
            reader_model=request.reader_model,
        )
        name = await convert.model_name(self._service, request.meta)
        made = await synthesis.synthesise(self._service, call, name, wanted, values, found=found)
        async with contextlib.aclosing(made.events()) as news:
            started = synth_qa_pb2.SynthQAStarted(**synthesis_answers.started(made, call))
            yield synth_qa_pb2.SynthQAEvent(started=started)
            async for item in news:
                if isinstance(item, Triple):
                    triple = synth_qa_pb2.SynthQATriple(**synthesis_answers.triple(item))
                    yield synth_qa_pb2.SynthQAEvent(triple=triple)
                else:
                    passage = synth_qa_pb2.SynthQAPassageDone(**synthesis_answers.passage(item))
                    yield synth_qa_pb2.SynthQAEvent(passage=passage)
            yield synth_qa_pb2.SynthQAEvent(finished=_finished(synthesis_answers.finished(made, call)))


def _finished(fields: dict[str, Any]) -> synth_qa_pb2.SynthQAFinished:
    return synth_qa_pb2.SynthQAFinished(**convert.choice(fields))
