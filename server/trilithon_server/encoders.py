"""
Which served encoder reads what: the questions and the passages of an index, or of a request.

The vectors of a search are of the encoder that made the index's, or of the one of questions that was trained beside it:
another one's mean nothing there. Which of two a model is, and whose passages it asks for, its text format says.
"""

from __future__ import annotations

from typing import Literal

from trilithon.errors import FailedPrecondition, NotFound
from trilithon_parallel.config import QUERY_DIR
from trilithon_server.knowledge.manifest import Encoder, Manifest
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.tasks.retrieval import Reads, RetrievalFormat
from trilithon_server.tasks.story_format import RankerFormat
from trilithon_server.validation import shown

QUESTIONS_SUFFIX = "-questions"
"""Of the name that a job gives the encoder of questions, where it trained two: the other one has the job's."""

RETRIEVER_SUFFIX = "-retriever"
"""Of the name that a job gives the encoder of passages that it trained beside a reader."""

Side = Literal["questions", "passages"]


async def encoder_of(service: Service, call: Call, manifest: Manifest, name: str, side: Side) -> ServedModel:
    """
    The served encoder of questions for an index, or that of its passages.

    Args:
        name: as a request gives it; empty: whichever it is.
    Raises:
        FailedPrecondition: `index_encoder`, it is another one, or none that is served.
        NotFound: `model_not_found`.
    """
    digest, builder = manifest.encoder.model_digest, manifest.encoder.model
    given = "none that is served"
    if name:
        model = await service.resolve(name, call)
        model.require("embed")
        if _fits(model, digest, side):
            return model
        if space_of(model) != digest:
            raise _other_encoder(manifest, f"`{model.name}`, {model.ready().model_digest}")
        given = f"`{model.name}` alone, one of two encoders, which does not read {side}"
    found = await _partner(service, call, digest, builder, side)
    if found is None:
        raise _other_encoder(manifest, given)
    return found


async def both_of(service: Service, call: Call, model: ServedModel) -> tuple[ServedModel, ServedModel]:
    """
    The served encoders of questions and of passages of an encoder's space: itself twice, or it and the other one.

    Raises:
        FailedPrecondition: `unsupported_model`, the other one is not served.
    """
    known = _sides(model).reads
    if known == "both":
        return model, model
    other: Side = "passages" if known == "questions" else "questions"
    builder = model.name.removesuffix(QUESTIONS_SUFFIX)
    found = await _partner(service, call, space_of(model), builder, other)
    if found is None:
        where = f"in its folder {QUERY_DIR}/" if other == "questions" else f"in the folder above its {QUERY_DIR}/"
        read, missing = _called(model, known), _called(model, other)
        raise FailedPrecondition(
            f"the encoder `{model.name}` is one of two: it reads {read} alone, and the one of {missing} is not served.",
            code="unsupported_model",
            hint=f"Serve the model {where}, too.",
        )
    return (model, found) if known == "questions" else (found, model)


async def _partner(service: Service, call: Call, digest: str, builder: str, side: Side) -> ServedModel | None:
    """
    What is served that reads one side of an encoder's space.

    Args:
        digest: of the encoder of the passages; `builder`: the name that it has or had.
    """
    for model in service.models.values():
        if model.encoder and model.engine.hello is not None and _fits(model, digest, side):
            return model
    for name in (builder, builder + QUESTIONS_SUFFIX) if builder else ():
        try:
            known: ServedModel = await service.resolve(name, call)
        except NotFound:
            continue
        if known.encoder and _fits(known, digest, side):
            return known
    return None


def _sides(model: ServedModel) -> RetrievalFormat | RankerFormat:
    """What says whether an encoder is one of two."""
    return model.story if isinstance(model.story, RankerFormat) else format_of(model)


def _called(model: ServedModel, side: Reads) -> str:
    """A side, in a user's words."""
    stories = {"both": "both", "questions": "stories", "passages": "facts"}
    return stories[side] if isinstance(model.story, RankerFormat) else side


def _fits(model: ServedModel, digest: str, side: Side) -> bool:
    return _sides(model).reads in ("both", side) and space_of(model) == digest


def space_of(model: ServedModel) -> str:
    """What vectors can be compared with: the digest of the encoder of passages."""
    return _sides(model).passages_by or model.ready().model_digest


def check_side(model: ServedModel, side: Side) -> None:
    """
    Raises:
        FailedPrecondition: `unsupported_model`, the encoder is one of two and reads the other side.
    """
    reads = _sides(model).reads
    if reads not in ("both", side):
        raise FailedPrecondition(
            f"the encoder `{model.name}` is one of two, and reads {_called(model, reads)} alone. Asked for: {side}.",
            code="unsupported_model",
            hint="Name the other one.",
        )


def _other_encoder(manifest: Manifest, given: str) -> FailedPrecondition:
    known = f"`{manifest.encoder.model}`, " if manifest.encoder.model else ""
    return FailedPrecondition(
        f"index {shown(manifest.index)} version {manifest.version} holds vectors of the encoder "
        f"{known}{manifest.encoder.model_digest}. Given: {given}.",
        code="index_encoder",
        hint="Ask with the encoder that built it, refresh the index with the other one, or search by words (bm25).",
    )


def default_encoder(service: Service) -> str:
    """
    The first served encoder; those with a task of their own, and those of questions alone, after the others.

    Raises:
        FailedPrecondition: `unsupported_model`, there is none.
    """
    encoders = [model for model in service.models.values() if model.encoder]
    if not encoders:
        raise FailedPrecondition(
            "vectors are compared, and no encoder is served.",
            code="unsupported_model",
            hint="Serve one beside the model, or search by words (bm25).",
        )
    return min(encoders, key=_is_special).name


def _is_special(model: ServedModel) -> bool:
    if model.task is not None or model.story is not None:
        return True
    return model.retrieval is not None and model.retrieval.reads == "questions"


def format_of(model: ServedModel) -> RetrievalFormat:
    """How an encoder reads questions and passages: as it was trained, else as suits its vectors."""
    hello = model.ready()
    return model.retrieval or RetrievalFormat.for_encoder(
        normalize=model.normalize, hidden_size=hello.hidden_size, max_context=hello.max_context_tokens
    )


def described(model: ServedModel) -> Encoder:
    """What an index tells of the encoder that made its vectors."""
    form = format_of(model)
    return Encoder(
        model_digest=model.ready().model_digest,
        pooling=model.pooling,
        normalize=model.normalize,
        passage_format=form.passage_format,
        score_scale=form.score_scale,
        model=model.name,
    )
