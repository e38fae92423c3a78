"""The services of `trilithon.api.v1`, each method a few lines over the service that HTTP calls too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from trilithon.api.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    embed_pb2,
    embed_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tokenize_pb2,
    tokenize_pb2_grpc,
)
from trilithon_server import adapter_verbs, answers
from trilithon_server.embedding import embed
from trilithon_server.generation import Generation
from trilithon_server.grpc import convert
from trilithon_server.grpc.gate import current_call
from trilithon_server.scoring import ScoreItem, score
from trilithon_server.service import Service
from trilithon_server.state import set_log_level, status
from trilithon_server.tokens import detokenize, page, render_chat, tokenize
from trilithon_server.validation import Violations, invalid

_POOLINGS = {
    embed_pb2.POOLING_MEAN: "mean",
    embed_pb2.POOLING_LAST: "last",
    embed_pb2.POOLING_FIRST: "first",
}


class Generations(generation_pb2_grpc.GenerationServiceServicer):
    """GenerationService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def _begin(self, request: generation_pb2.GenerateRequest, context: Any, *, stream: bool) -> Generation:
        found = Violations()
        prompt, field = convert.prompt_of(request.prompt, found)
        generation = await self._service.generate(
            current_call(),
            await convert.model_name(self._service, request.meta),
            [prompt],
            convert.generate_values(request),
            found=found,
            stream=stream,
            field=field,
        )
        # A cancelled stream may be dropped while it waits for a send, outside our generator: do not wait for its end.
        context.add_done_callback(lambda _: generation.close("disconnect"))
        return generation

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        """Answer when all is generated."""
        async with await self._begin(request, context, stream=False) as generation:
            await generation.joined()
            fields = answers.generated(generation)
        fields["choices"] = convert.choices(fields["choices"])
        return generation_pb2.GenerateResponse(**fields)

    async def GenerateStream(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.GenerateEvent]:
        """Answer token by token."""
        async with await self._begin(request, context, stream=True) as generation:
            offsets = generation.params.return_offsets
            async for part, choice in generation.news():
                if choice is None:
                    yield generation_pb2.GenerateEvent(
                        started=generation_pb2.Started(**answers.started(generation, part))
                    )
                else:
                    part.stream.streamed = True
                    news = convert.choice(answers.choice_news(choice, offsets=offsets))
                    yield generation_pb2.GenerateEvent(delta=generation_pb2.Choice(**news))
            finished = answers.finished(generation)
            yield generation_pb2.GenerateEvent(finished=generation_pb2.Finished(**finished))

    async def Score(self, request: generation_pb2.ScoreRequest, context: Any) -> generation_pb2.ScoreResponse:
        """How likely are these continuations?"""
        found = Violations()
        items = []
        for i, item in enumerate(request.items):
            prompt = None
            if item.HasField("context"):
                prompt, _ = convert.prompt_of(item.context, found, field=f"items[{i}].context")
            items.append(
                ScoreItem(
                    context=prompt,
                    continuations=list(item.continuations),
                    continuation_tokens=[list(tokens.ids) for tokens in item.continuation_tokens],
                )
            )
        result = await score(
            self._service,
            current_call(),
            await convert.model_name(self._service, request.meta),
            items,
            convert.meta_values(request.meta),
            top=request.top,
            found=found,
        )
        return generation_pb2.ScoreResponse(**answers.scores(result))

    async def Abort(self, request: generation_pb2.AbortRequest, context: Any) -> generation_pb2.AbortResponse:
        """End a request of the same key."""
        if not request.request_id:
            raise invalid("request_id", "must be set", code="missing_parameter")
        running = self._service.running.abort(current_call(), request.request_id)
        return generation_pb2.AbortResponse(was_running=running)


class Tokens(tokenize_pb2_grpc.TokenizeServiceServicer):
    """TokenizeService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Tokenize(self, request: tokenize_pb2.TokenizeRequest, context: Any) -> tokenize_pb2.TokenizeResponse:
        """Texts to token ids."""
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        model, results = await tokenize(
            self._service,
            current_call(),
            request.model,
            list(request.texts),
            add_special_tokens=special,
            pieces=request.return_pieces,
            offsets=request.return_offsets,
            truncate=request.truncate_tokens,
        )
        return tokenize_pb2.TokenizeResponse(
            results=[tokenize_pb2.Tokenized(**answers.tokenized(result)) for result in results],
            max_context_tokens=model.describe()["max_context_tokens"],
            tokenizer_digest=model.tokenizer.digest,
        )

    async def Detokenize(
        self, request: tokenize_pb2.DetokenizeRequest, context: Any
    ) -> tokenize_pb2.DetokenizeResponse:
        """Token ids to texts."""
        texts = await detokenize(
            self._service,
            current_call(),
            request.model,
            [list(tokens.ids) for tokens in request.tokens],
            keep_special=request.keep_special_tokens,
        )
        return tokenize_pb2.DetokenizeResponse(texts=texts)

    async def RenderChat(
        self, request: tokenize_pb2.RenderChatRequest, context: Any
    ) -> tokenize_pb2.RenderChatResponse:
        """A conversation to text and ids."""
        found = Violations()
        chat = convert.conversation(request.chat, found)
        model, text, ids = await render_chat(self._service, current_call(), request.model, chat, found=found)
        digest = model.template_digest
        return tokenize_pb2.RenderChatResponse(text=text, ids=ids, template_digest=digest)


class Embeddings(embed_pb2_grpc.EmbedServiceServicer):
    """EmbedService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Embed(self, request: embed_pb2.EmbedRequest, context: Any) -> embed_pb2.EmbedResponse:
        """One vector per input."""
        found = Violations()
        values = convert.meta_values(request.meta)
        inputs = []
        for i, item in enumerate(request.inputs):
            prompt, _ = convert.prompt_of(item, found, field=f"inputs[{i}]")
            inputs.append(prompt)
            for name, value in convert.prompt_values(item).items():
                if values.setdefault(name, value) != value:
                    found.add(f"inputs[{i}].{name}", "must be the same for all inputs", given=value)
        if request.pooling and request.pooling not in _POOLINGS:
            found.add("pooling", "must be one of mean, last, first", given=request.pooling)
        name = await convert.model_name(self._service, request.meta)
        model, vectors, counts = await embed(
            self._service,
            current_call(),
            name,
            inputs,
            values,
            pooling=_POOLINGS.get(request.pooling),
            normalize=request.normalize if request.HasField("normalize") else None,
            dimensions=request.dimensions,
            found=found,
        )
        data = [
            embed_pb2.Embedding(index=i, values=vector.values, tokens=vector.tokens) for i, vector in enumerate(vectors)
        ]
        return embed_pb2.EmbedResponse(model=model.name, data=data, usage=common_pb2.Usage(**answers.usage(counts)))


class Models(models_pb2_grpc.ModelsServiceServicer):
    """ModelsService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ListModels(self, request: models_pb2.ListModelsRequest, context: Any) -> models_pb2.ListModelsResponse:
        """Every model that the key may see."""
        tenant = current_call().principal.tenant
        found, more = await page(self._service, tenant, after=request.after, limit=request.limit, kind=request.kind)
        data = [convert.model(row) for row in found]
        return models_pb2.ListModelsResponse(data=data, has_more=more)

    async def GetModel(self, request: models_pb2.GetModelRequest, context: Any) -> models_pb2.Model:
        """One of them."""
        return await self._row(_id(request.id))

    async def LoadAdapter(self, request: models_pb2.LoadAdapterRequest, context: Any) -> models_pb2.Model:
        """Load an adapter before its first request."""
        allow = request.allow_template_mismatch
        names, call = self._service.names, current_call()
        return await self._row(
            await adapter_verbs.load(names, _id(request.id), call, alias=request.alias, allow_template_mismatch=allow)
        )

    async def UnloadAdapter(
        self, request: models_pb2.UnloadAdapterRequest, context: Any
    ) -> models_pb2.UnloadAdapterResponse:
        """Take an adapter out of memory once its requests have ended."""
        in_flight = await adapter_verbs.unload(
            self._service.names, _id(request.id), current_call(), drain=request.drain
        )
        return models_pb2.UnloadAdapterResponse(requests_in_flight=in_flight)

    async def SetAlias(self, request: models_pb2.SetAliasRequest, context: Any) -> models_pb2.Model:
        """Point an alias to a model."""
        if not request.target:
            raise invalid("target", "must be set", code="missing_parameter")
        expected = request.expected_target if request.HasField("expected_target") else None
        await adapter_verbs.set_alias(self._service.names, request.alias, request.target, expected, current_call())
        return await self._row(request.alias)

    async def DeleteAlias(self, request: models_pb2.DeleteAliasRequest, context: Any) -> models_pb2.DeleteAliasResponse:
        """Take an alias away."""
        if not request.alias:
            raise invalid("alias", "must be set", code="missing_parameter")
        expected = request.expected_target if request.HasField("expected_target") else None
        target = await adapter_verbs.delete_alias(self._service.names, request.alias, expected, current_call())
        return models_pb2.DeleteAliasResponse(alias=request.alias, target=target)

    async def _row(self, name: str) -> models_pb2.Model:
        return convert.model(await self._service.names.describe(name, current_call().principal.tenant))


def _id(given: str) -> str:
    if not given:
        raise invalid("id", "must be set", code="missing_parameter")
    return given


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """AdminService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Status(self, request: admin_pb2.StatusRequest, context: Any) -> admin_pb2.StatusResponse:
        """What the server is doing."""
        return admin_pb2.StatusResponse(**status(self._service))

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainResponse:
        """Take no more work, finish what is in flight, then stop."""
        limit_s = request.limit_seconds if request.HasField("limit_seconds") else None
        if limit_s is not None and limit_s > 3600:
            raise invalid("limit_seconds", "must be from 0 to 3600", given=limit_s)
        return admin_pb2.DrainResponse(requests_in_flight=self._service.drain(limit_s))

    async def AbortAll(self, request: admin_pb2.AbortAllRequest, context: Any) -> admin_pb2.AbortAllResponse:
        """End every request."""
        return admin_pb2.AbortAllResponse(aborted=self._service.abort_all(request.model))

    async def ResetPrefixCache(
        self, request: admin_pb2.ResetPrefixCacheRequest, context: Any
    ) -> admin_pb2.ResetPrefixCacheResponse:
        """Forget every cached block that no request holds."""
        self._service.reset_prefix_cache(request.model)
        return admin_pb2.ResetPrefixCacheResponse()

    async def SetLogLevel(self, request: admin_pb2.SetLogLevelRequest, context: Any) -> admin_pb2.SetLogLevelResponse:
        """Change how much is logged."""
        if request.level not in ("debug", "info", "warning", "error"):
            raise invalid("level", "must be one of debug, info, warning, error", given=request.level)
        return admin_pb2.SetLogLevelResponse(previous=set_log_level(request.level))
