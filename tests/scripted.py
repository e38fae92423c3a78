"""Small real servers that answer as a test tells them to, and remember what they were asked."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from trilithon.api.v1 import (
    common_pb2,
    embed_pb2,
    embed_pb2_grpc,
    extract_pb2,
    extract_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tokenize_pb2,
    tokenize_pb2_grpc,
)
from trilithon.errors import TrilithonError
from trilithon_server.errors import http_error, rpc_status


@dataclass
class Asked:
    """One HTTP request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class Reply:
    """One HTTP answer; `events` makes it a stream, `hang` keeps it open after them, `cut` ends it without its end."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[tuple[str, Any]] | None = None
    hang: bool = False
    cut: bool = False


@dataclass
class Scripted:
    """What a scripted server was asked, and what it will answer: the next of `replies`, the last one for ever."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a client hung up on a hanging stream."""
    answer: Callable[[Asked], Reply] | None = None

    def next_reply(self, asked: Asked) -> Reply:
        """Decide, and remember the question."""
        self.asked.append(asked)
        if self.answer is not None:
            return self.answer(asked)
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def refusal(error: TrilithonError) -> Reply:
    """The server's own answer to an error."""
    status, headers, body = http_error(error)
    named = {name.decode(): value.decode() for name, value in headers}
    return Reply(status=status, body=json.loads(body), headers=named)


def _handler(scripted: Scripted) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def _do(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = scripted.next_reply(Asked(self.command, self.path, headers, body))
            if reply.events is not None:
                self._stream(reply)
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, reply: Reply) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream; charset=utf-8")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for name, data in reply.events or ():
                text = data if isinstance(data, str) else json.dumps(data)
                content = (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()
                self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
            if reply.hang:
                self.connection.settimeout(30)
                if self.connection.recv(1) == b"":
                    scripted.left.set()
                self.close_connection = True
            elif reply.cut:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_DELETE = _do

    return Handler


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = super().get_request()
        return connection, ("unix", 0)


@contextmanager
def http_server(*replies: Reply, uds: str | None = None) -> Iterator[Scripted]:
    """A scripted HTTP server on a free port of 127.0.0.1, or on a Unix socket."""
    scripted = Scripted("", list(replies))
    server: socketserver.BaseServer
    if uds is not None:
        server = _UnixServer(uds, _handler(scripted))
        scripted.url = f"http+unix://{uds}"
    else:
        tcp = ThreadingHTTPServer(("127.0.0.1", 0), _handler(scripted))
        scripted.url = f"http://127.0.0.1:{tcp.server_address[1]}"
        server = tcp
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CHOICE = {
    "index": 0,
    "text": " upon\u2028a time",
    "tokens": [{"id": 5, "text": " upon", "logprob": -0.5, "rank": 1, "top": [{"id": 5, "logprob": -0.5, "rank": 1}]}],
    "finish_reason": "max_tokens",
    "seed": 2**62 + 1,
    "cumulative_logprob": -0.5,
    "generated_tokens": 1,
}
STARTED = {"request_id": "req_1", "model": "m", "fingerprint": "tri-1", "prompt_tokens": 2}
FINISHED = {"usage": {"prompt_tokens": 2, "generated_tokens": 1}, "timings": {"total_ms": 2.5}}
GENERATED = {
    "request_id": "req_1",
    "model": "m",
    "fingerprint": "tri-1",
    "choices": [CHOICE],
    "usage": FINISHED["usage"],
    "timings": FINISHED["timings"],
}
EVENTS = (("started", STARTED), ("delta", CHOICE), ("finished", FINISHED))
MODEL = {"id": "m", "kind": "base", "state": "ready", "max_context_tokens": 64, "tp": 2, "pp": 1, "dtype": "float32"}


_GENE = {"start": 0, "end": 3, "type": "GENE", "text": "p53", "score": 0.5}
_EXTRACT_TOLD = {"model": "t", "usage": {"prompt_tokens": 5}, "timings": {"total_ms": 2.5}}
EXTRACTED: Mapping[str, Any] = {
    "Annotate": {"documents": [{"entities": [_GENE]}], **_EXTRACT_TOLD},
    "ExtractRelations": {
        "relations": [
            {"label": "binds", "score": 0.75, "probs": {"binds": 0.75, "false": 0.25}, "pair": {"a": _GENE, "b": _GENE}}
        ],
        "negative_label": "false",
        "pairs_dropped": 1,
        **_EXTRACT_TOLD,
    },
    "Answer": {
        "answers": [{"text": "p53", "probability": 0.5, "context": 0, "start": 0, "end": 3}],
        "no_answer_probability": 0.25,
        "no_answer": False,
        **_EXTRACT_TOLD,
    },
    "Classify": {
        "results": [{"label": "yes", "score": 0.75, "probs": {"yes": 0.75, "no": 0.25}, "truncated": True}],
        **_EXTRACT_TOLD,
    },
}
"""Answers of ExtractService by method; their fields are those of the JSON bodies."""


def contract(asked: Asked) -> Reply:
    """What a server of the contract answers over HTTP, with fixed values; `answers` of gRPC are the same ones."""
    body = asked.body or {}
    path = asked.path.partition("?")[0]
    if path == "/v1/generate":
        return Reply(events=EVENTS) if body.get("stream") else Reply(body=GENERATED)
    if path == "/v1/completions":
        texts = [("", {"choices": [{"index": 0, "text": " a"}]})] * body["max_tokens"]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        return Reply(events=[*texts, ("", {"choices": [], "usage": usage}), ("", "[DONE]")])
    count = len(body["items"][0]["continuations"]) if path == "/v1/score" else 0
    return Reply(
        body={
            "/v1/score": {
                "items": [
                    {
                        "sum_logprob": [-1.5] * count,
                        "token_count": [2] * count,
                        "byte_count": [6] * count,
                        "is_greedy": [True] * count,
                    }
                ],
                "usage": {"prompt_tokens": 4},
            },
            "/v1/embeddings": {
                "object": "list",
                "model": "e",
                "data": [{"object": "embedding", "index": 0, "embedding": "AACAPwAAAMA="}],  # 1.0, -2.0
                "usage": {"prompt_tokens": 3, "total_tokens": 3},
            },
            "/v1/tokenize": {"results": [{"ids": [1, 2], "pieces": ["a", "b"], "count": 2}], "max_context_tokens": 64},
            "/v1/detokenize": {"texts": ["ab"]},
            "/v1/render": {"text": "<user>hi", "ids": [3]},
            "/v1/extract/entities": EXTRACTED["Annotate"],
            "/v1/extract/relations": EXTRACTED["ExtractRelations"],
            "/v1/extract/spans": EXTRACTED["Answer"],
            "/v1/extract/classes": EXTRACTED["Classify"],
            "/v1/models": {"object": "list", "data": [{"object": "model", **MODEL}]},
            "/v1/models/m": MODEL,
            "/v1/requests/req_1": {"was_running": True},
            "/readyz": {"status": "ok", "reason": ""},
        }[path]
    )


# gRPC -------------------------------------------------------------------------------------------------------


@dataclass
class GrpcScripted:
    """What a gRPC server was asked (message, metadata, seconds left), and the errors it will first answer with."""

    url: str = ""
    asked: list[tuple[Any, Mapping[str, str], float | None]] = field(default_factory=list)
    failures: list[TrilithonError | tuple[grpc.StatusCode, str]] = field(default_factory=list)
    hang: bool = False
    left: threading.Event = field(default_factory=threading.Event)
    fail_after_first: TrilithonError | None = None


def _choice() -> generation_pb2.Choice:
    return generation_pb2.Choice(
        text=CHOICE["text"],
        tokens=[
            generation_pb2.TokenInfo(
                id=5, text=" upon", logprob=-0.5, rank=1, top=[generation_pb2.TokenInfo(id=5, logprob=-0.5, rank=1)]
            )
        ],
        finish_reason=common_pb2.FINISH_REASON_MAX_TOKENS,
        seed=2**62 + 1,
        cumulative_logprob=-0.5,
        generated_tokens=1,
    )


_USAGE = common_pb2.Usage(prompt_tokens=2, generated_tokens=1)
_TIMINGS = common_pb2.Timings(total_ms=2.5)
_ANSWERS: Mapping[str, Any] = {
    "Generate": generation_pb2.GenerateResponse(
        request_id="req_1", model="m", fingerprint="tri-1", choices=[_choice()], usage=_USAGE, timings=_TIMINGS
    ),
    "Score": generation_pb2.ScoreResponse(
        items=[generation_pb2.ItemScore(sum_logprob=[-1.5], token_count=[2], byte_count=[6], is_greedy=[True])],
        usage=common_pb2.Usage(prompt_tokens=4),
    ),
    "Abort": generation_pb2.AbortResponse(was_running=True),
    "Embed": embed_pb2.EmbedResponse(
        model="e", data=[embed_pb2.Embedding(values=[1.0, -2.0])], usage=common_pb2.Usage(prompt_tokens=3)
    ),
    "Tokenize": tokenize_pb2.TokenizeResponse(
        results=[tokenize_pb2.Tokenized(ids=[1, 2], pieces=["a", "b"], count=2)], max_context_tokens=64
    ),
    "Detokenize": tokenize_pb2.DetokenizeResponse(texts=["ab"]),
    "RenderChat": tokenize_pb2.RenderChatResponse(text="<user>hi", ids=[3]),
    "Annotate": extract_pb2.AnnotateResponse(**EXTRACTED["Annotate"]),
    "ExtractRelations": extract_pb2.RelationsResponse(**EXTRACTED["ExtractRelations"]),
    "Answer": extract_pb2.SpanAnswerResponse(**EXTRACTED["Answer"]),
    "Classify": extract_pb2.ClassifyResponse(**EXTRACTED["Classify"]),
    "ListModels": models_pb2.ListModelsResponse(
        data=[
            models_pb2.Model(
                id="m",
                kind=models_pb2.Model.KIND_BASE,
                state=models_pb2.Model.STATE_READY,
                max_context_tokens=64,
                tp=2,
                pp=1,
                dtype="float32",
            )
        ]
    ),
}


def _unary(scripted: GrpcScripted, name: str) -> Callable[[Any, grpc.ServicerContext], Any]:
    def method(request: Any, context: grpc.ServicerContext) -> Any:
        _note(scripted, request, context)
        return _ANSWERS["ListModels"].data[0] if name == "GetModel" else _ANSWERS[name]

    return method


def _note(scripted: GrpcScripted, request: Any, context: grpc.ServicerContext) -> None:
    metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
    scripted.asked.append((request, metadata, context.time_remaining()))
    if scripted.failures:
        fail(context, scripted.failures.pop(0))


def fail(context: grpc.ServicerContext, failure: TrilithonError | tuple[grpc.StatusCode, str]) -> None:
    """End an RPC as the server does, or with a bare status."""
    if isinstance(failure, TrilithonError):
        code, text, rich = rpc_status(failure)
        context.set_trailing_metadata((("grpc-status-details-bin", rich),))
        context.abort(code, text)
    else:
        context.abort(*failure)


def _stream(scripted: GrpcScripted) -> Callable[[Any, grpc.ServicerContext], Iterator[generation_pb2.GenerateEvent]]:
    def method(request: Any, context: grpc.ServicerContext) -> Iterator[generation_pb2.GenerateEvent]:
        _note(scripted, request, context)
        context.add_callback(scripted.left.set)
        started = generation_pb2.Started(request_id="req_1", model="m", fingerprint="tri-1", prompt_tokens=2)
        yield generation_pb2.GenerateEvent(started=started)
        yield generation_pb2.GenerateEvent(delta=_choice())
        if scripted.fail_after_first is not None:
            fail(context, scripted.fail_after_first)
        if scripted.hang:
            scripted.left.wait(30)
            return
        finished = generation_pb2.Finished(usage=_USAGE, timings=_TIMINGS)
        yield generation_pb2.GenerateEvent(finished=finished)

    return method


@contextmanager
def grpc_server(uds: str | None = None) -> Iterator[GrpcScripted]:
    """A gRPC server of the contract, with fixed answers, on a free port of 127.0.0.1 or on a Unix socket."""
    scripted = GrpcScripted()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    for add, base in (
        (generation_pb2_grpc.add_GenerationServiceServicer_to_server, generation_pb2_grpc.GenerationServiceServicer),
        (embed_pb2_grpc.add_EmbedServiceServicer_to_server, embed_pb2_grpc.EmbedServiceServicer),
        (extract_pb2_grpc.add_ExtractServiceServicer_to_server, extract_pb2_grpc.ExtractServiceServicer),
        (tokenize_pb2_grpc.add_TokenizeServiceServicer_to_server, tokenize_pb2_grpc.TokenizeServiceServicer),
        (models_pb2_grpc.add_ModelsServiceServicer_to_server, models_pb2_grpc.ModelsServiceServicer),
    ):
        names = [name for name in vars(base) if name[0].isupper()]
        methods = {name: _stream(scripted) if name == "GenerateStream" else _unary(scripted, name) for name in names}
        servicer: Any = type("Servicer", (), {name: staticmethod(method) for name, method in methods.items()})()
        add(servicer, server)  # type: ignore[operator]  # each with its own servicer type
    if uds is not None:
        server.add_insecure_port(f"unix:{uds}")
        scripted.url = f"grpc+unix://{uds}"
    else:
        scripted.url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield scripted
    finally:
        server.stop(None).wait()
