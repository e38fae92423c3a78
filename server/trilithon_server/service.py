"""
The service: what both fronts call. A front parses and writes; everything between is here, once.

    authenticate -> limit -> validate -> tokenise -> lengths -> compile constraint -> bounded queue -> stream

Everything left of the bounded queue costs the engine nothing. All of it runs on one asyncio loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Unpack

from trilithon.errors import DeadlineExceeded, NotFound
from trilithon_server.adapters import Names
from trilithon_server.assembly import Choice
from trilithon_server.auth import Keyring
from trilithon_server.calls import CallDetails, Calls
from trilithon_server.catalog import Catalog
from trilithon_server.config import ServeConfig, environment_api_keys
from trilithon_server.constraint_rules import Constraint
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.constraint_check import ConstraintError
from trilithon_server.engine_client import EngineStream
from trilithon_server.generation import Generation, Part
from trilithon_server.hosting import Hosting
from trilithon_server.knowledge.concepts import read_concepts
from trilithon_server.knowledge.fact_vectors import FactVectors
from trilithon_server.knowledge.indexes import Indexes
from trilithon_server.limits import KeyLimiter
from trilithon_server.metrics import Metrics
from trilithon_server.prompts import Prepared, Prompt, Sequenced, answer_room, bad_word_ids, check_reading, prepare
from trilithon_server.recent import Recent
from trilithon_server.running import Running
from trilithon_server.sampling import SamplingParams, to_wire, validate
from trilithon_server.served import AdapterRef, Call, Capability, ServedModel
from trilithon_server.story_requests import MAX_STORIES, STORY_KEPT_S, Story
from trilithon_server.tracing import make_tracer
from trilithon_server.validation import Bounds, Violations, nearest, shown

VERSION = importlib.metadata.version("trilithon")

DEADLINE_MARGIN_S = 0.05
"""Generation stops this long (or two steps) before a client's deadline, so that the answer still arrives."""

__all__ = ["ServedModel", "Service"]


class Service:
    """
    Args:
        config: the whole configuration.
        models: what is served; the first is the one that an unnamed model means when it is alone.
        metrics: of this process.
        hosting: starts finetuned models when they are asked for; None where there is no supervisor to start them.
    Raises:
        KeysError: the keys file is not usable.
        ConceptsError: nor are the concepts.
        ValueError: traces are asked for and cannot be made.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Sequence[ServedModel],
        metrics: Metrics,
        *,
        hosting: Hosting | None = None,
    ) -> None:
        self.config = config
        self.limits = config.limits
        self.models = {model.name: model for model in models}
        self.metrics = metrics
        self.hosting = hosting
        self.catalog = Catalog(Path(config.server.catalog)) if config.server.catalog is not None else None
        self.store = Path(config.server.store) if config.server.store is not None else None
        self.concepts = read_concepts(Path(config.server.concepts)) if config.server.concepts is not None else None
        self.fact_vectors = FactVectors()
        self.stories = Recent[Story](most=MAX_STORIES, kept_s=STORY_KEPT_S)
        self.indexes = Indexes(self.store / "indexes") if self.store is not None else None
        self.find_file: Callable[[str, str], Awaitable[Path]] | None = None
        """Set by an extension that keeps files: where the bytes of a file lie, by its id and its tenant."""
        self.names = Names(self.models, config.engines, catalog=self.catalog, hosting=hosting)
        file = config.server.api_keys_file
        self.keys = Keyring.load(Path(file) if file is not None else None, environment_api_keys())
        self.limiter = KeyLimiter(config.limits)
        self.started_s = time.monotonic()
        self.drain_hook: Callable[[float | None], None] | None = None
        """Set by the front process: begins the drain of the whole server, as SIGTERM does."""
        self._calls = Calls(self.keys, self.limiter, metrics, make_tracer(config.telemetry, version=VERSION))
        self._started = False
        self.running = Running()
        for model in models:
            metrics.watch_engine(model.name, model.engine)

    async def start(self) -> None:
        """Start the workers that compile constraints, so that the first constraint does not wait for one."""
        await asyncio.gather(*(m.checker.start() for m in self.models.values() if m.checker is not None))

    async def stop(self) -> None:
        """End those workers and the builds of indexes; idempotent."""
        if self.indexes is not None:
            await self.indexes.stop()
        await asyncio.gather(*(m.checker.stop() for m in self.models.values() if m.checker is not None))

    # -- every call -----------------------------------------------------------------------------------------

    def call(self, **details: Unpack[CallDetails]) -> AbstractContextManager[Call]:
        """The frame of one call, see `Calls.open`."""
        return self._calls.open(**details)

    # -- models ---------------------------------------------------------------------------------------------

    def model(self, name: str) -> ServedModel:
        """
        A configured model; an empty name means the only one.

        Raises:
            NotFound: `model_not_found`, naming the choices.
        """
        found = self.models.get(name or (next(iter(self.models)) if len(self.models) == 1 else ""))
        if found is None:
            served = ", ".join(f"`{item}`" for item in self.models)
            what = f"no model {shown(name)}" if name else "several models are served; name one"
            raise NotFound(f"{what}. Served here: {served}.{nearest(name, self.models)}", code="model_not_found")
        return found

    def first(self, capability: Capability) -> str:
        """The first model that can do something, for requests that cannot name one; empty when there is none."""
        return next((name for name, model in self.models.items() if capability in model.capabilities), "")

    async def resolve(self, name: str, call: Call, *, able: Capability | None = None) -> ServedModel:
        """The model that a call means, see `Names.resolve`; where it names none, the only one that is `able`."""
        fit = [known for known, model in self.models.items() if able in model.capabilities]
        return await self.names.resolve(name or (fit[0] if len(fit) == 1 else ""), call)

    def fingerprint(self, hello: wire.Hello, adapter: AdapterRef | None = None) -> str:
        """Version, layout, configuration and adapter: answers repeat only while it is the same."""
        weights = hello.model_digest if adapter is None else f"{hello.model_digest}+{adapter.digest}"
        parts = f"{weights} {hello.dtype} {hello.device} {hello.max_batch_tokens} {hello.block_size}"
        digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
        return f"tri-{VERSION}-tp{hello.tp}pp{hello.pp}-{digest}"

    # -- generation -----------------------------------------------------------------------------------------

    async def generate(
        self,
        call: Call,
        model_name: str,
        prompts: Sequence[Prompt],
        values: Mapping[str, Any],
        *,
        found: Violations | None = None,
        stream: bool = False,
        default_max_tokens: int | None = None,
        field: str = "prompt",
        always_tokens: bool = False,
    ) -> Generation:
        """
        Validate, tokenise and admit; use the result as an asynchronous context manager.

        Args:
            call: from `call()`.
            model_name: empty = the only one that writes.
            prompts: 1 to `limits.max_prompts`.
            values: parameters by JSON name.
            found: violations that the front has already found; reported together with ours.
            stream: whether the answer is streamed.
            default_max_tokens: of the route.
            field: what the request calls its prompt.
            always_tokens: keep tokens even when no log-probabilities are asked for.
        Raises:
            TrilithonError: refused; nothing was admitted.
        """
        violations = found if found is not None else Violations()
        model = await self.resolve(model_name, call, able="generate")
        model.require("generate")
        hello = model.ready()
        bounds = model.bounds(call.principal, hello, default_max_tokens=default_max_tokens)
        params = validate(values, bounds, violations, stream=stream)
        if model.is_seq2seq:
            check_reading(params, violations)
        if not 1 <= len(prompts) <= self.limits.max_prompts:
            violations.add(field, f"must hold from 1 to {self.limits.max_prompts} prompts", given=len(prompts))
        violations.raise_if_any()
        prepared, rooms = await self._prepare(model, prompts, params, bounds, hello, field)
        bad_words = bad_word_ids(model, params, bounds)
        if params.constraint is not None:
            await self._check_constraint(model, params.constraint, min(rooms))
        return self._admit(
            call, model, hello, params, prepared, rooms, bad_words, always_tokens or params.return_token_ids
        )

    async def _prepare(
        self,
        model: ServedModel,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        bounds: Bounds,
        hello: wire.Hello,
        field: str,
    ) -> tuple[list[Prepared], list[int]]:
        prepared, rooms = [], []
        for i, prompt in enumerate(prompts):
            name = field if len(prompts) == 1 else f"{field}[{i}]"
            item = await prepare(model, prompt, params, bounds, field=name)
            rooms.append(answer_room(item, params, bounds, hello, field=name))
            prepared.append(item)
        return prepared, rooms

    async def _check_constraint(self, model: ServedModel, constraint: Constraint, room: int) -> None:
        if constraint.kind == "choice":
            sizes = [len(model.tokenizer.encode(text, add_special_tokens=False)) for text in constraint.choices]
            if min(sizes) > room:
                message = f"the shortest of `constraint.choice` has {min(sizes)} tokens, `max_tokens` is {room}."
                violations = Violations()
                violations.say("constraint.choice", message, code="constraint_too_long", given=str(min(sizes)))
                violations.raise_if_any()
        before_s = time.monotonic()
        assert model.checker is not None  # it generates
        try:
            await model.checker.check(constraint.to_wire())
        except ConstraintError as error:
            self.metrics.constraint_failures.labels(error.code).inc()
            field, message = f"constraint.{constraint.kind}", str(error)
            if error.code == "invalid_constraint":
                message = f"`{field}` does not compile: {message}"
            violations = Violations()
            violations.say(field, message, code=error.code, rule="must compile within its budget")
            violations.raise_if_any()
        finally:
            self.metrics.constraint_compile.observe(time.monotonic() - before_s)

    def _admit(
        self,
        call: Call,
        model: ServedModel,
        hello: wire.Hello,
        params: SamplingParams,
        prepared: Sequence[Prepared],
        rooms: Sequence[int],
        bad_words: tuple[tuple[int, ...], ...],
        with_tokens: bool,
    ) -> Generation:
        """From here to the table of running requests nothing is awaited: a client that leaves cannot slip between."""
        total = sum(len(item.ids) for item in prepared)
        model.engine.check_admission(total, requests=len(prepared))
        limit_s = self.time_left_s(call, model, params.time_limit_ms)
        self.limiter.spend_tokens(call.principal, total)
        parts: list[Part] = []
        try:
            for i, (item, room) in enumerate(zip(prepared, rooms, strict=True)):
                seed = params.seed if params.seed is not None else secrets.randbits(63)
                sampling = to_wire(
                    params,
                    seed=seed,
                    max_tokens=room,
                    end_token_ids=model.tokenizer.eos_ids,
                    reset_token_ids=model.texts.sentence_ends if params.top_p_decay is not None else (),
                    bad_words=bad_words,
                )
                stream = self.submit(call, model, item.packed, params, limit_s=limit_s, sampling=sampling)
                prefix = item.text(model, skip_special=params.skip_special_tokens) if params.echo else ""
                choices = [
                    Choice(
                        index=i * params.n + j,
                        texts=model.texts,
                        params=params,
                        seed=seed,
                        prefix=prefix,
                        with_tokens=with_tokens or params.logprobs is not None,
                    )
                    for j in range(params.num_told)
                ]
                parts.append(Part(prepared=item, stream=stream, choices=choices))
        except BaseException:
            for part in parts:
                part.stream.abort("cancelled")
            raise
        generation = Generation(
            call=call,
            model=model,
            fingerprint=self.fingerprint(hello, model.adapter),
            params=params,
            parts=parts,
            limit_s=limit_s,
            metrics=self.metrics,
            on_close=lambda closed: self.running.remove(call, closed),
        )
        self.running.add(call, generation)
        return generation

    def submit(
        self,
        call: Call,
        model: ServedModel,
        prompt: Sequenced,
        params: SamplingParams,
        *,
        limit_s: float,
        sampling: wire.Sampling | None = None,
        pooling: wire.Pooling | None = None,
    ) -> EngineStream:
        """Put one prompt into the bounded queue; raises `Overloaded` or `Unavailable`."""
        submit = prompt.to_wire()
        submit.MergeFrom(
            wire.Submit(
                request_id=call.request_id,
                sampling=sampling,
                pooling=pooling,
                cache_salt=model.salt(call.principal, params.cache_salt),
                bypass_cache=params.bypass_cache,
                priority=params.priority,
                queue_timeout_ms=params.queue_timeout_ms or self.limits.default_queue_timeout_ms,
                time_limit_ms=max(1, int(1000 * limit_s)),
                adapter=model.adapter.wire if model.adapter is not None else None,
            )
        )
        return model.engine.submit(submit)

    def time_left_s(self, call: Call, model: ServedModel, time_limit_ms: int) -> float:
        """
        Seconds that the engine may work on a call: its time limit, or less by the client's deadline.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        now = time.monotonic()
        end_s = call.arrived_s + (time_limit_ms or self.limits.max_time_limit_ms) / 1000
        if call.deadline_s is not None:
            step_s = model.engine.stats.step_seconds if model.engine.stats is not None else 0.0
            end_s = min(end_s, call.deadline_s - max(DEADLINE_MARGIN_S, 2 * step_s))
        if end_s <= now:
            raise DeadlineExceeded("the time limit passed before the request could be queued.", code="timeout")
        return end_s - now

    # -- running requests -----------------------------------------------------------------------------------

    def abort_all(self, model_name: str = "", cause: str = "cancelled") -> int:
        """End every request, or those of one model; how many there were."""
        models = [self.model(model_name)] if model_name else self.running_models
        count = sum(model.engine.in_flight for model in models)
        for model in models:
            model.engine.abort_all(cause)
        return count

    def reset_prefix_cache(self, model_name: str = "") -> None:
        """Forget every cached block that no request holds."""
        named = [self.model(model_name)] if model_name else list(self.models.values())
        for model in named:
            model.ready()
        for model in named if model_name else self.running_models:
            model.engine.send_control(wire.Control.RESET_PREFIX_CACHE)

    # -- state ----------------------------------------------------------------------------------------------

    @property
    def running_models(self) -> list[ServedModel]:
        """The configured models, and finetuned ones that run on engines of their own."""
        return [*self.models.values(), *(self.hosting.models if self.hosting is not None else ())]

    @property
    def in_flight(self) -> int:
        """Requests that engines hold, queued ones included."""
        return sum(model.engine.in_flight for model in self.running_models)

    def drain(self, limit_s: float | None) -> int:
        """
        Begin the drain of the whole server, as SIGTERM does; returns at once with the requests in flight.

        Args:
            limit_s: how long they may go on; None = the configured limit.
        """
        self.refuse_new()
        if self.drain_hook is not None:
            self.drain_hook(limit_s)
        return self.in_flight

    def refuse_new(self) -> None:
        """Give no model to calls that begin from now on; the calls that have begun go on to their ends."""
        self._calls.draining = True
        for model in self.models.values():
            model.engine.drain()
        if self.hosting is not None:
            self.hosting.drain()

    async def wait_idle(self) -> None:
        """Return once the calls that `refuse_new` lets go on have ended."""
        await self._calls.wait_idle()

    @property
    def draining(self) -> bool:
        """Whether new work is refused because the server is on its way down."""
        return self._calls.draining

    def readiness(self) -> tuple[bool, str]:
        """Whether every engine answers, and if not, why: loading, draining, lost or failed."""
        for model in self.models.values():
            if model.engine.state != "ready":
                return False, model.engine.state
        return True, "ready"

    def has_started(self) -> bool:
        """Whether every engine has been ready once."""
        self._started = self._started or all(
            model.engine.hello is not None or model.engine.losses for model in self.models.values()
        )
        return self._started
