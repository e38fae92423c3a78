"""
The front process: one asyncio loop, an HTTP and a gRPC listener over one service, a client for each engine. No torch.

    python -m trilithon_server.front --config FILE --run-dir DIR --control-fd N --status-fd M

It listens while the engines still load, so that liveness answers from the first second. SIGTERM and SIGINT are
ignored here: the supervisor's control pipe decides about drain and end, and its closing ends the process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trilithon_server import logs
from trilithon_server.config import EngineConfig, ServeConfig, authority, read_config
from trilithon_server.engine.beats import BeatReader, beats_path
from trilithon_server.engine.constraint_check import ConstraintChecker
from trilithon_server.engine_client import EngineClient
from trilithon_server.extension import Extension
from trilithon_server.hosting import Hosting
from trilithon_server.listeners import HttpListener, ListenError, serve_http, serve_metrics
from trilithon_server.metrics import CONTENT_TYPE, Metrics
from trilithon_server.served import ServedModel

if TYPE_CHECKING:
    from trilithon_server.service import Service

ALIVE_INTERVAL_S = 1.0
STALL_S = 10.0  # work in flight, no step finished and none under way for this long: the leader is stuck
ABORT_GRACE_S = 2.0  # for the engine to confirm aborts
LINGER_S = 0.3  # what was just cut short must reach its client before the connections close under it
FLUSH_S = 2.0  # for answers that are already made to reach their clients

_log = logging.getLogger(__name__)


class FrontRefused(ValueError):
    """A setting that only the front can judge is wrong; the message is one sentence."""


class Front:
    """Everything that lives in the front process."""

    def __init__(
        self, config: ServeConfig, *, run_dir: Path, status_fd: int, extensions: Sequence[Extension] = ()
    ) -> None:
        self.config = config
        self._run_dir = run_dir
        self.clients = {engine.name: self._client(engine.name) for engine in config.engines}
        self.metrics = Metrics(version=importlib.metadata.version("trilithon"))
        self.hosting = Hosting(
            config,
            make_client=self._client,
            load=lambda engine, client: load_model(engine, client, config),
            report=self._report,
            metrics=self.metrics,
        )
        self._extensions = extensions
        self._status_fd = status_fd
        self._abort = asyncio.Event()
        self._drain = asyncio.Event()
        self._drain_s = 0.0
        self._control_closed = asyncio.Event()

    async def run(self, control_fd: int) -> None:
        """Serve until the supervisor says drain or abort, or goes away."""
        from trilithon_server.grpc.server import build_server
        from trilithon_server.http.app import build_app
        from trilithon_server.service import Service

        models = [load_model(engine, self.clients[engine.name], self.config) for engine in self.config.engines]
        metrics = self.metrics
        for client in self.clients.values():
            client.hello_listeners.append(functools.partial(self._report, event="connected", name=client.name))
            await client.start()
        try:
            service = Service(self.config, models, metrics, hosting=self.hosting)
            for extension in self._extensions:
                await extension.start(service)
        except ValueError as error:  # a keys file, a tracing setup or a store that can't be used
            raise FrontRefused(str(error)) from None
        service.drain_hook = lambda seconds: self._report(event="drain_requested", seconds=seconds)
        app = build_app(service, config=self.config, extensions=self._extensions)
        rpc = await build_server(service, config=self.config, extensions=self._extensions)
        await rpc.start()
        tasks: list[asyncio.Task[None]] = []
        listeners: list[HttpListener] = []
        try:
            listeners.append(await serve_http(app, config=self.config, on_rejected=metrics.rejected))
            scrapes = await serve_metrics(metrics.render, content_type=CONTENT_TYPE, config=self.config)
            listeners += [scrapes] if scrapes is not None else []
            tasks = [_task(self._read_control(control_fd)), _task(self._report_alive()), _task(service.start())]
            server = self.config.server
            self._report(
                event="listening",
                http=authority(server.host, server.http_port),
                grpc=authority(server.host, server.grpc_port),
            )
            await self._drain.wait()
            await self._finish_in_flight(service)
            self._report(event="drained")
        finally:
            await asyncio.gather(self.hosting.stop(), *(client.stop() for client in self.clients.values()))
            await asyncio.gather(rpc.stop(FLUSH_S), *(listener.stop(grace_s=FLUSH_S) for listener in listeners))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(extension.stop() for extension in self._extensions))
            await service.stop()

    async def _finish_in_flight(self, service: Service) -> None:
        """Refuse new work, let what is in flight go on up to the limit, then end it with its own reason."""
        service.refuse_new()
        clients = self._engines()
        for extension in self._extensions:
            extension.drain()
        waits = [client.wait_idle() for client in clients] + [item.wait_idle() for item in self._extensions]
        idle = asyncio.gather(service.wait_idle(), *waits)
        if not await _within(idle, self._abort, self._drain_s):
            _log.warning("drain_limit", extra={"in_flight": sum(client.in_flight for client in clients)})
            for client in clients:
                client.shut()
            for extension in self._extensions:
                extension.abort()
            await asyncio.wait([idle], timeout=ABORT_GRACE_S)
        for client in clients:
            client.fail_all_shutdown()
        idle.cancel()  # who does not read what is told is not waited for
        if self._abort.is_set() or any(client.state == "failed" for client in clients):
            await asyncio.sleep(LINGER_S)

    async def _read_control(self, fd: int) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0))
            async for line in reader:
                self._on_control(json.loads(line))
        finally:  # the supervisor is gone: nothing is left to serve for
            self._abort.set()
            self._drain.set()

    def _on_control(self, event: dict[str, Any]) -> None:
        if event["event"] == "engine":
            client = self.clients.get(event["name"])
            if client is None:
                self.hosting.engine_event(event["name"], event["state"], cause=event["cause"], kind=event["kind"])
            else:
                client.engine_event(event["state"], cause=event["cause"], kind=event["kind"])
        elif event["event"] == "drain":
            self._drain_s = float(event["seconds"])
            self._drain.set()
        elif event["event"] == "abort":
            self._abort.set()
            self._drain.set()

    async def _report_alive(self) -> None:
        while True:
            self._report(event="alive")
            for client in self._engines():
                silent_s = time.monotonic() - client.last_progress_s
                patience_s = STALL_S + self.config.limits.constraint_compile_s
                if (
                    client.state == "ready"
                    and client.in_flight
                    and silent_s > patience_s
                    and not self._stepping(client)
                ):
                    self._report(event="stalled", name=client.name, seconds=silent_s)
            await asyncio.sleep(ALIVE_INTERVAL_S)

    def _client(self, name: str) -> EngineClient:
        return EngineClient(
            name=name,
            socket_path=self._run_dir / f"{name}.sock",
            limits=self.config.limits,
            restarts=self.config.server.on_rank_loss == "restart",
        )

    def _engines(self) -> list[EngineClient]:
        return [*self.clients.values(), *self.hosting.clients]

    def _stepping(self, client: EngineClient) -> bool:
        """Whether the leader is inside a step; then its deadline, watched by the supervisor, is what counts."""
        with BeatReader(beats_path(self._run_dir, client.name), num_ranks=1) as reader:
            return reader.read()[0].deadline_ns != 0

    def _report(self, **event: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._status_fd, json.dumps(event).encode() + b"\n")


def load_model(engine: EngineConfig, client: EngineClient, config: ServeConfig) -> ServedModel:
    """
    What the service needs of a model: names, tokenizer, template, shape. Reads the model directory, loads no weights.

    Raises:
        ModelError, TemplateError: the directory has no usable tokenizer, config or template.
    """
    from trilithon_parallel.config import load_config
    from trilithon_parallel.tokenizer import load_tokenizer
    from trilithon_server.task_model import load_reader, load_task
    from trilithon_server.tasks import read_task
    from trilithon_server.tasks.dialogue_format import DialogueFormat
    from trilithon_server.tasks.msdp_format import MsdpFormat
    from trilithon_server.tasks.question_format import QuestionFormat
    from trilithon_server.tasks.reader_format import ReaderFormat
    from trilithon_server.tasks.retrieval import RetrievalFormat
    from trilithon_server.tasks.story_format import StoryFormat
    from trilithon_server.text.template import load_template

    directory = Path(engine.model)
    model = load_config(directory)
    task = read_task(directory)
    override = Path(engine.chat_template) if engine.chat_template is not None else None
    tokenizer = load_tokenizer(directory)
    max_context = min(engine.max_context or model.max_context, model.max_context)
    limits = config.limits
    checker = ConstraintChecker(
        directory, compile_s=limits.constraint_compile_s, memory_bytes=limits.constraint_memory_bytes
    )
    return ServedModel(
        name=engine.served_name or engine.name,
        engine=client,
        tokenizer=tokenizer,
        template=None if model.is_seq2seq else load_template(directory, override),
        limits=limits,
        checker=checker if model.num_decoder_layers else None,
        task=load_task(directory, config=model, tokenizer=tokenizer, max_context=max_context),
        dialogue=task if isinstance(task, DialogueFormat | MsdpFormat) else None,
        story=task if isinstance(task, StoryFormat) else None,
        retrieval=task if isinstance(task, RetrievalFormat) else None,
        questions=task if isinstance(task, QuestionFormat) else None,
        reader=load_reader(task, model, tokenizer, max_context) if isinstance(task, ReaderFormat) else None,
        decoder_start_id=(model.decoder_start_id or 0) if model.is_seq2seq else None,
        encoder=model.family == "bert",
        pooling="first" if model.pooling == "cls" else "mean",
        normalize=model.normalize,
        max_context=max_context,
        vocab_size=model.vocab_size,
    )


def main(argv: list[str] | None = None, *, extend: Callable[[ServeConfig], Sequence[Extension]] = lambda _: ()) -> int:
    """Entry of the process; the exit code. `extend` makes what a front of another package adds."""
    parser = argparse.ArgumentParser(prog="trilithon_server.front")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--colour", action="store_true", help="colour text logs, though they go to a pipe")
    args = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    config = read_config(args.config)
    log_format = logs.resolve_format(config.server.log_format)
    logs.configure(log_format=log_format, level=config.server.log_level, colour=args.colour, process="front")
    from trilithon_parallel.config import ModelError
    from trilithon_server.text.template import TemplateError

    try:
        front = Front(config, run_dir=args.run_dir, status_fd=args.status_fd, extensions=extend(config))
        _run_loop(front.run(args.control_fd))
    except (ListenError, FrontRefused) as error:
        return _fatal(args.status_fd, 2, error)
    except (ModelError, TemplateError) as error:
        return _fatal(args.status_fd, 3, error)
    return 0


def _fatal(status_fd: int, exit_code: int, error: Exception) -> int:
    line = json.dumps({"event": "fatal", "exit_code": exit_code, "message": str(error)})
    os.write(status_fd, line.encode() + b"\n")
    return exit_code


def _run_loop(main_coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # not on every platform; the standard loop serves too
        asyncio.run(main_coroutine)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main_coroutine)


def _task(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(coroutine)
    task.add_done_callback(_log_failure)
    return task


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("task_failed", exc_info=task.exception())


async def _within(work: asyncio.Future[Any], interrupt: asyncio.Event, seconds: float) -> bool:
    """Wait for `work`, at most `seconds` and only until `interrupt`; whether it is done."""
    interrupted = asyncio.ensure_future(interrupt.wait())
    try:
        await asyncio.wait([work, interrupted], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        interrupted.cancel()
    return work.done()


if __name__ == "__main__":
    sys.exit(main())
