"""OpenQAService of `trilithon.api.v1`, over the function that HTTP calls too."""

from __future__ import annotations

from typing import Any

from trilithon.api.v1 import openqa_pb2, openqa_pb2_grpc
from trilithon_server import openqa, openqa_answers
from trilithon_server.grpc import convert
from trilithon_server.grpc.dialogue import documents_of
from trilithon_server.grpc.gate import current_call
from trilithon_server.grpc.retrieval import mode_of
from trilithon_server.openqa import READERS, Asked
from trilithon_server.service import Service
from trilithon_server.validation import Violations

_READERS: dict[int, str] = {
    openqa_pb2.AnswerRequest.READER_UNSPECIFIED: "",
    openqa_pb2.AnswerRequest.READER_JOINT: "joint",
    openqa_pb2.AnswerRequest.READER_INDIVIDUAL: "individual",
    openqa_pb2.AnswerRequest.READER_SPAN: "span",
    openqa_pb2.AnswerRequest.READER_CAUSAL: "causal",
}


class OpenAnswers(openqa_pb2_grpc.OpenQAServiceServicer):
    """OpenQAService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Answer(self, request: openqa_pb2.AnswerRequest, context: Any) -> openqa_pb2.AnswerResponse:
        """One answer, with its evidence."""
        found = Violations()
        if request.reader not in _READERS:
            found.add("reader", f"must be one of {', '.join(READERS)}", given=request.reader)
        asked = Asked(
            question=request.question,
            index=request.index,
            documents=documents_of(request.documents),
            top_k=request.top_k,
            reader=_READERS.get(request.reader, ""),
            mode=mode_of(request.mode, found),
            retriever=request.retriever,
            min_version=request.min_version,
        )
        name = await convert.model_name(self._service, request.meta)
        values = convert.task_values(request)
        result = await openqa.answer(self._service, current_call(), name, asked, values, found=found)
        fields = openqa_answers.answered(result, with_evidence=request.return_evidence)
        fields["reader"] = f"READER_{fields['reader'].upper()}"
        return openqa_pb2.AnswerResponse(**convert.choice(fields))
