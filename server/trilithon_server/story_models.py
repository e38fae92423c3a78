"""Who tells a story: the models of its parts, each with the format that it reads, chosen before anything is done."""

from __future__ import annotations

from dataclasses import dataclass

from trilithon.errors import FailedPrecondition
from trilithon_server.encoders import both_of
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.story_knowledge import Ranker
from trilithon_server.task_model import adapter_task
from trilithon_server.tasks import TaskFormat
from trilithon_server.tasks.story_format import GUIDE, KeywordFormat, RankerFormat, SentenceFormat


@dataclass(frozen=True, kw_only=True)
class Cast:
    """
    Attributes:
        writer, writing: writes sentences.
        predictor, predicting: writes keywords.
        ranker: chooses facts; None where no encoder is served, or no fact is asked for.
    """

    writer: ServedModel
    writing: SentenceFormat
    predictor: ServedModel
    predicting: KeywordFormat
    ranker: Ranker | None


async def cast(
    service: Service, call: Call, writer_name: str, *, predictor_name: str, ranker_name: str, may_have_facts: bool
) -> Cast:
    """
    The models of a story; those that are not named are chosen: one that was trained for the part, if it is served, else
    the writer's base model to predict keywords, and an encoder without a head to rank.

    Args:
        may_have_facts: whether there is something to rank: a story without facts needs no encoder.
    Raises:
        TrilithonError: there is no model of that name, it cannot do its part, or is not ready.
    """
    writer = await service.resolve(writer_name, call, able="generate")
    writer.require("generate")
    base = writer.name if writer.adapter is None else writer.adapter.base
    predictor = await service.resolve(predictor_name or _trained(service, KeywordFormat) or base, call)
    predictor.require("generate")
    ranker = None
    name = ranker_name or _trained(service, RankerFormat) or _encoder(service)
    if name and may_have_facts and service.concepts is not None:
        encoder = await service.resolve(name, call)
        encoder.require("embed")
        encoder.ready()
        ranker = Ranker(*await both_of(service, call, encoder), _ranking_of(encoder))
    for model in (writer, predictor, *(() if ranker is None else (ranker.reader, ranker.knower))):
        model.ready()
        model.engine.check_admission(1)  # a full queue is told before a stream begins
    known_writing, known_predicting = _format(writer), _format(predictor)
    writing = known_writing if isinstance(known_writing, SentenceFormat) else _sentences_in_words(writer)
    predicting = known_predicting if isinstance(known_predicting, KeywordFormat) else _keywords_in_words(predictor)
    _check(writer, writing)
    _check(predictor, predicting)
    return Cast(
        writer=writer,
        writing=writing,
        predictor=predictor,
        predicting=predicting,
        ranker=ranker,
    )


def _trained(service: Service, kind: type[KeywordFormat | RankerFormat]) -> str:
    """The first configured model that was trained for a part; empty for none."""
    return next((name for name, model in service.models.items() if isinstance(model.story, kind)), "")


def _encoder(service: Service) -> str:
    """The first configured encoder whose vectors are what it is for; empty for none."""
    fit = (name for name, model in service.models.items() if model.encoder and model.task is None and _reads_all(model))
    return next(fit, "")


def _reads_all(model: ServedModel) -> bool:
    return model.retrieval is None or model.retrieval.reads == "both"


def _sentences_in_words(model: ServedModel) -> SentenceFormat:
    """For a model that was not trained on stories."""
    window = model.max_context
    return SentenceFormat(guide=GUIDE, max_story=window // 2, max_knowledge=min(256, window // 8))


def _keywords_in_words(model: ServedModel) -> KeywordFormat:
    """The same beginning as the sentences have: what the one has read is cached for the other."""
    return KeywordFormat(guide=GUIDE, max_story=model.max_context // 2)


def _ranking_of(model: ServedModel) -> RankerFormat:
    """As it was trained, else as fits."""
    known, window = _format(model), model.max_context
    if isinstance(known, RankerFormat):
        return known
    return RankerFormat(max_story=min(128, window), max_fact=min(64, window))


def _check(model: ServedModel, format: SentenceFormat | KeywordFormat) -> None:
    try:
        format.check(model.tokenizer)
    except ValueError as error:
        message = f"model `{model.name}` cannot read stories as its task file says: {error}"
        raise FailedPrecondition(message, code="task_invalid") from None


def _format(model: ServedModel) -> TaskFormat | None:
    """What a model was trained for, by its task file or its adapter's."""
    if model.adapter is None:
        return model.story
    return adapter_task(model.adapter.directory, model.adapter.digest)
