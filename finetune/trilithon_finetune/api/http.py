"""The HTTP routes of jobs: each a few lines over the door that gRPC calls too."""

from __future__ import annotations

import json
from contextlib import aclosing

from trilithon.errors import NotFound
from trilithon_finetune.api import answers, convert, history, results
from trilithon_finetune.api.checks import Checks
from trilithon_finetune.api.door import Door
from trilithon_finetune.api.exports import Exports
from trilithon_finetune.api.frames import NOSNIFF, PAGE, Handler, busy, calm
from trilithon_finetune.api.requests import (
    estimate_of,
    flag,
    idempotency_key,
    last_event_id,
    no_body,
    number,
    page_limit,
    parsed,
)
from trilithon_finetune.api.schemas import CreateJobBody, DeployBody, ExportBody
from trilithon_finetune.config import JobConfig
from trilithon_finetune.jobs.states import JobState
from trilithon_server.http.endpoint import Route
from trilithon_server.http.events import EventStream
from trilithon_server.http.exchange import Exchange
from trilithon_server.validation import Violations, invalid

DONE = b"data: [DONE]\n\n"
"""The last line of a stream of events that has ended by itself."""

_JOB = "/v1/fine_tuning/jobs/{job_id}"
_STATES = [state.value for state in JobState]


class HttpJobs:
    """Handlers over the door."""

    def __init__(self, door: Door, checks: Checks, exports: Exports) -> None:
        self._door = door
        self._checks = checks
        self._exports = exports

    def routes(self) -> tuple[Route, ...]:
        """The table."""
        changes = ("503",)
        return (
            Route(
                method="POST", path="/v1/fine_tuning/jobs", handler=busy(self._door, self._create),
                request=CreateJobBody, answer="FineTuningJob", more_errors=("409",),
                summary="Queue a finetuning job, in OpenAI's shape.",
            ),
            Route(
                method="GET", path="/v1/fine_tuning/jobs", handler=calm(self._list), answer="FineTuningJobs",
                query={**PAGE, "state": {"enum": _STATES}}, more_errors=changes, summary="Jobs, newest first.",
            ),
            Route(
                method="GET", path=_JOB, handler=calm(self._get), answer="FineTuningJob", more_errors=changes,
                summary="One job.",
            ),
            *(
                Route(
                    method="POST", path=f"{_JOB}/{verb}", handler=busy(self._door, self._mover(verb)),
                    answer="FineTuningJob", more_errors=("415", "503", "504"), summary=summary,
                )
                for verb, summary in (
                    ("cancel", "End a job; its last good checkpoint stays."),
                    ("pause", "Write a checkpoint and let go of the machine."),
                    ("resume", "Go on from the last checkpoint."),
                )
            ),
            Route(
                method="GET", path=f"{_JOB}/events", handler=calm(self._events), answer="FineTuningEvents",
                query={
                    **PAGE,
                    "stream": {"enum": ["true", "false"]},
                    "follow": {"enum": ["true", "false"]},
                    "after_seq": {"type": "integer", "minimum": 0},
                },
                stream=True, more_errors=changes, summary="Events, newest first; streamed, from the first on.",
            ),
            Route(
                method="GET", path=f"{_JOB}/checkpoints", handler=calm(self._checkpoints),
                answer="FineTuningCheckpoints", query=PAGE, more_errors=changes, summary="Checkpoints, newest first.",
            ),
            Route(
                method="GET", path=f"{_JOB}/metrics", handler=calm(self._metrics), answer="JobMetrics",
                query={
                    "after_step": {"type": "integer", "minimum": 0},
                    "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
                },
                more_errors=changes, summary="The numbers of a job's steps and evaluations.",
            ),
            Route(
                method="GET", path=f"{_JOB}/report", handler=calm(self._report), answer="DatasetReport",
                more_errors=changes, summary="What validation found out about a job's data.",
            ),
            Route(
                method="GET", path=f"{_JOB}/logs", handler=calm(self._logs), media="text/plain",
                query={"attempt": {"type": "integer", "minimum": 1}, "rank": {"type": "integer", "minimum": 0}},
                more_errors=changes, summary="The end of what a rank printed.",
            ),
            Route(
                method="GET", path=f"{_JOB}/plot.svg", handler=calm(self._plot), media="image/svg+xml",
                more_errors=changes, summary="The curves of a job as a picture.",
            ),
            Route(
                method="POST", path=f"{_JOB}/export", handler=busy(self._door, self._export), request=ExportBody,
                answer="File", summary="What a job made, as a zip file; an adapter also merged into its base.",
            ),
            Route(
                method="POST", path=f"{_JOB}/deploy", handler=busy(self._door, self._deploy), request=DeployBody,
                answer="Deployed", more_errors=("409",), summary="Point an alias at what a job made.",
            ),
            Route(
                method="POST", path="/v1/fine_tuning/estimate", handler=busy(self._door, self._estimate),
                request=CreateJobBody, answer="Estimate", summary="What a job would take; nothing is queued.",
            ),
        )  # fmt: skip

    async def _config(self, exchange: Exchange, tenant: str) -> JobConfig:
        config = convert.job_config(await exchange.json(), self._door.limits)
        await self._door.run(self._door.check_models, config, tenant=tenant)
        return config

    async def _create(self, exchange: Exchange, tenant: str) -> None:
        key = idempotency_key(exchange.header(b"idempotency-key"))
        config = await self._config(exchange, tenant)
        job = await self._door.run(self._door.jobs.create, config, tenant=tenant, idempotency_key=key)
        await exchange.respond_json(answers.job(job))

    async def _list(self, exchange: Exchange, tenant: str) -> None:
        query = exchange.query((*PAGE, "state"))
        state = query.get("state")
        if state is not None and state not in _STATES:
            raise invalid("state", f"must be one of {', '.join(_STATES)}", given=state)
        page = await self._door.run(
            self._door.jobs.list,
            tenant=tenant,
            after=query.get("after"),
            limit=page_limit(query),
            states=() if state is None else (JobState(state),),
        )
        await exchange.respond_json(answers.page(page, answers.job))

    async def _get(self, exchange: Exchange, tenant: str) -> None:
        exchange.query(())
        job = await self._door.run(self._door.jobs.get, exchange.path_params["job_id"], tenant=tenant)
        await exchange.respond_json(answers.job(job))

    def _mover(self, verb: str) -> Handler:
        async def move(exchange: Exchange, tenant: str) -> None:
            await no_body(exchange)
            method = getattr(self._door.jobs, verb)
            job = await self._door.run(method, exchange.path_params["job_id"], tenant=tenant)
            await exchange.respond_json(answers.job(job))

        return move

    async def _events(self, exchange: Exchange, tenant: str) -> None:
        query = exchange.query((*PAGE, "stream", "follow", "after_seq"))
        stream = flag(query, "stream", default=False)
        found = Violations()
        for name in ("after", "limit") if stream else ("after_seq", "follow"):
            if name in query:
                found.add(name, f"must be unset {'with' if stream else 'without'} `stream=true`", given=query[name])
        found.raise_if_any()
        job_id = exchange.path_params["job_id"]
        if stream:
            after_seq = number(query, "after_seq", default=last_event_id(exchange), low=0)
            wait = flag(query, "follow", default=True)
            await exchange.race(self._stream(exchange, job_id, tenant, after_seq, wait))
            return
        limit = page_limit(query)
        before = query.get("after")
        events, more = await self._door.run(
            history.events_back, self._door.jobs, job_id, tenant=tenant, before=before, limit=limit
        )
        await exchange.respond_json(answers.listed([answers.event(event) for event in events], has_more=more))

    async def _stream(self, exchange: Exchange, job_id: str, tenant: str, after_seq: int, wait: bool) -> None:
        await self._door.run(self._door.jobs.get, job_id, tenant=tenant)  # 404 before the stream begins
        events = self._door.follow(job_id, tenant=tenant, after_seq=after_seq, wait=wait)
        async with EventStream(exchange, named_errors=True) as out, aclosing(events):
            async for event in events:
                data = json.dumps(answers.event(event), ensure_ascii=False, separators=(",", ":"))
                await out.send(f"id: {event.seq}\ndata: {data}\n\n".encode("utf-8", "replace"))
            await out.send(DONE)

    async def _checkpoints(self, exchange: Exchange, tenant: str) -> None:
        query = exchange.query(PAGE)
        page = await self._door.run(
            self._door.jobs.checkpoints,
            exchange.path_params["job_id"],
            tenant=tenant,
            after=query.get("after"),
            limit=page_limit(query),
        )
        await exchange.respond_json(answers.page(page, answers.checkpoint))

    async def _metrics(self, exchange: Exchange, tenant: str) -> None:
        query = exchange.query(("after_step", "limit"))
        rows, more = await self._door.run(
            history.metrics_page,
            self._door.jobs,
            exchange.path_params["job_id"],
            tenant=tenant,
            after_step=number(query, "after_step", default=0, low=0),
            limit=number(query, "limit", default=1000, low=1, high=10_000),
        )
        await exchange.respond_json({"object": "list", "data": rows, "has_more": more})

    async def _report(self, exchange: Exchange, tenant: str) -> None:
        exchange.query(())
        job = await self._door.run(self._door.jobs.get, exchange.path_params["job_id"], tenant=tenant)
        if job.report is None:
            message = f"job {job.id} has no report of its data. Given: a job that is {job.state.value}."
            raise NotFound(message, code="report_not_found")
        await exchange.respond_json(job.report)

    async def _logs(self, exchange: Exchange, tenant: str) -> None:
        query = exchange.query(("attempt", "rank"))
        text = await self._door.run(
            history.log_text,
            self._door.jobs,
            exchange.path_params["job_id"],
            tenant=tenant,
            attempt=number(query, "attempt", default=0, low=1) or None,
            rank=number(query, "rank", default=0, low=0),
        )
        await exchange.respond(200, text.encode(), media=b"text/plain; charset=utf-8", headers=[NOSNIFF])

    async def _plot(self, exchange: Exchange, tenant: str) -> None:
        exchange.query(())
        job_id = exchange.path_params["job_id"]
        svg = await self._door.run(history.picture, self._door.jobs, job_id, tenant=tenant)
        headers = [(b"content-security-policy", b"default-src 'none'"), NOSNIFF]
        await exchange.respond(200, svg.encode(), media=b"image/svg+xml", headers=headers)

    async def _estimate(self, exchange: Exchange, tenant: str) -> None:
        config = await self._config(exchange, tenant)

        async def work() -> None:
            data = await self._checks.validate(config, tenant=tenant)
            await exchange.respond_json(estimate_of(data))

        await exchange.race(work())

    async def _export(self, exchange: Exchange, tenant: str) -> None:
        body = await parsed(ExportBody, exchange)

        async def work() -> None:
            job_id = exchange.path_params["job_id"]
            file = await self._exports.export(job_id, tenant=tenant, step=body.step, format=body.format)
            await exchange.respond_json(answers.file(file))

        await exchange.race(work())

    async def _deploy(self, exchange: Exchange, tenant: str) -> None:
        body = await parsed(DeployBody, exchange)
        job_id = exchange.path_params["job_id"]
        model, previous = await self._door.run(
            results.deploy, self._door, job_id, tenant=tenant, step=body.step, alias=body.alias
        )
        await exchange.respond_json({"model": model, "alias": body.alias, "previous": previous})
