"""ExtractService of `trilithon.api.v1`, over the functions that HTTP calls too."""

from __future__ import annotations

from typing import Any

from trilithon.api.v1 import extract_pb2, extract_pb2_grpc
from trilithon_server import extract_answers, extraction
from trilithon_server.extraction import Mention
from trilithon_server.grpc import convert
from trilithon_server.grpc.gate import current_call
from trilithon_server.service import Service
from trilithon_server.validation import Violations


class Extractions(extract_pb2_grpc.ExtractServiceServicer):
    """ExtractService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Annotate(self, request: extract_pb2.AnnotateRequest, context: Any) -> extract_pb2.AnnotateResponse:
        """Entities of texts."""
        documents, told = await extraction.annotate(
            self._service,
            current_call(),
            await convert.model_name(self._service, request.meta),
            list(request.texts),
            convert.meta_values(request.meta),
            types=list(request.types),
        )
        return extract_pb2.AnnotateResponse(**extract_answers.annotated(documents, told))

    async def ExtractRelations(
        self, request: extract_pb2.RelationsRequest, context: Any
    ) -> extract_pb2.RelationsResponse:
        """How pairs of entities of a text are related."""
        found = Violations()
        for i, pair in enumerate(request.pairs):
            for side in ("a", "b"):
                if not pair.HasField(side):
                    found.add(f"pairs[{i}].{side}", "must be set", code="missing_parameter")
        result = await extraction.relate(
            self._service,
            current_call(),
            await convert.model_name(self._service, request.meta),
            request.text,
            convert.meta_values(request.meta),
            pairs=[(_mention(pair.a), _mention(pair.b)) for pair in request.pairs],
            entities=[_mention(entity) for entity in request.entities],
            tagger=request.tagger,
            found=found,
        )
        return extract_pb2.RelationsResponse(**extract_answers.related(result))

    async def Answer(self, request: extract_pb2.SpanAnswerRequest, context: Any) -> extract_pb2.SpanAnswerResponse:
        """Spans of texts that answer a question."""
        result = await extraction.answer(
            self._service,
            current_call(),
            await convert.model_name(self._service, request.meta),
            request.question,
            list(request.contexts),
            convert.meta_values(request.meta),
            n_best=request.n_best,
            null_threshold=request.null_threshold if request.HasField("null_threshold") else None,
        )
        return extract_pb2.SpanAnswerResponse(**extract_answers.answered(result))

    async def Classify(self, request: extract_pb2.ClassifyRequest, context: Any) -> extract_pb2.ClassifyResponse:
        """One label for each text."""
        results, told = await extraction.classify(
            self._service,
            current_call(),
            await convert.model_name(self._service, request.meta),
            list(request.texts),
            convert.meta_values(request.meta),
            text_pairs=list(request.text_pairs),
        )
        return extract_pb2.ClassifyResponse(**extract_answers.classified(results, told))


def _mention(entity: extract_pb2.Entity) -> Mention:
    return Mention(start=entity.start, end=entity.end, type=entity.type, text=entity.text)
