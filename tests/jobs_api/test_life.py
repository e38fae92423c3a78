"""The life of the front with jobs and of what runs beside it: drain, restarts, refusals (R5)."""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from front_server import ACME, bearer
from jobs_server import DATA, JobsServer

from trilithon import Client, DeadlineExceeded, Internal
from trilithon.api.v1 import finetune_pb2 as pb
from trilithon.api.v1 import finetune_pb2_grpc
from trilithon_finetune.api.launch import launch
from trilithon_server.config import EngineConfig, JobsConfig, ServeConfig
from trilithon_server.config_sources import ConfigError
from trilithon_server.engine.companions import Companions
from trilithon_server.extension import Companion

Start = Callable[..., AbstractContextManager[JobsServer]]

COMPANION = """
import pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
(here / "starts").open("a").write("started\\n")
def end(*_):
    (here / "ended").write_text("in good order")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("the worker speaks", flush=True)
while not (here / "die").exists():
    time.sleep(0.02)
(here / "die").unlink()
sys.exit(9)
"""


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, with a generous deadline."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def test_R5_a_drain_ends_streams_with_a_reason_and_lets_an_upload_finish(start_jobs: Start, tmp_path: Path) -> None:
    """
    SIGTERM ends streams of events over both protocols with `server_shutting_down`, an upload that has begun is
    finished, new work is refused, the companion, which was started again after a crash, ends in good order.

    Inverse check: without `drain` of the extension the streams hang until the drain's limit and end without a code.
    """
    script = tmp_path / "companion.py"
    script.write_text(COMPANION)
    with start_jobs(COMPANION=str(script)) as served_jobs:
        server, serving = served_jobs.server, served_jobs.jobs.paths.serving
        reserved = [json.loads(path.read_text()) for path in serving.iterdir()]
        (tmp_path / "die").touch()
        until(lambda: (tmp_path / "starts").read_text().count("started") == 2)
        job = served_jobs.job()
        told: dict[str, Any] = {}
        begun = {name: threading.Event() for name in ("http", "grpc", "upload")}

        def over_http() -> None:
            url = f"{server.url}/v1/fine_tuning/jobs/{job.id}/events?stream=true"
            with httpx.stream("GET", url, headers=bearer(ACME), timeout=60) as answer:
                for line in answer.iter_lines():
                    begun["http"].set()
                    if line.startswith("data: ") and "error" in line:
                        told["http"] = json.loads(line[6:])["error"]["code"]

        def over_grpc() -> None:
            with served_jobs.channel() as channel:
                stub = finetune_pb2_grpc.FinetuneServiceStub(channel)
                call = stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=(("x-api-key", ACME),), timeout=60)
                try:
                    for _ in call:
                        begun["grpc"].set()
                except grpc.RpcError as error:
                    told["grpc"] = error.code()  # type: ignore[attr-defined]  # the stubs do not say so

        draining = threading.Event()

        def pieces() -> Any:
            yield b'--B\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            yield b'--B\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + DATA
            begun["upload"].set()
            assert draining.wait(60)
            yield b"\r\n--B--\r\n"

        def upload() -> None:
            headers = bearer(ACME) | {"content-type": "multipart/form-data; boundary=B"}
            told["upload"] = httpx.post(f"{server.url}/v1/files", content=pieces(), headers=headers, timeout=60)

        threads = [threading.Thread(target=target) for target in (over_http, over_grpc, upload)]
        for thread in threads:
            thread.start()
        for event in begun.values():
            assert event.wait(60)
        server.process.send_signal(signal.SIGTERM)
        threads[0].join(60)
        threads[1].join(60)
        refused = httpx.post(f"{server.url}/v1/fine_tuning/jobs/{job.id}/cancel", headers=bearer(ACME), timeout=60)
        draining.set()
        threads[2].join(60)
        code = server.process.wait(60)
        output = server.output()

    assert (told["http"], told["grpc"]) == ("server_shutting_down", grpc.StatusCode.UNAVAILABLE)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert told["upload"].status_code == 200
    assert told["upload"].json()["bytes"] == len(DATA)
    assert code == 0
    assert [(item["cores"], item["memory_bytes"] > 16 << 20) for item in reserved] == [(0, True)]
    assert list(serving.iterdir()) == []  # what it kept for itself is free again
    assert (tmp_path / "ended").read_text() == "in good order"
    assert "companion_lost" in output
    assert "the worker speaks" in output


def test_R5_the_drains_limit_ends_an_upload_with_a_reason(start_jobs: Start) -> None:
    """
    An upload that is still under way at the drain's limit is ended with a typed error and leaves nothing behind.

    Inverse check: without `abort` of the extension the front never ends and is killed.
    """
    with start_jobs("--drain-seconds", "1") as served_jobs:
        server = served_jobs.server
        begun, end = threading.Event(), threading.Event()

        def pieces() -> Any:
            yield b'--B\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            yield b'--B\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + DATA
            begun.set()
            end.wait(60)
            yield b"x"

        def upload() -> None:
            headers = bearer(ACME) | {"content-type": "multipart/form-data; boundary=B"}
            with contextlib.suppress(httpx.TransportError):  # it is still sending when it is answered
                httpx.post(f"{server.url}/v1/files", content=pieces(), headers=headers, timeout=60)

        thread = threading.Thread(target=upload)
        thread.start()
        assert begun.wait(60)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
        end.set()
        thread.join(60)
        output = server.output()

    assert code == 0
    assert "front_killed" not in output
    assert "server_shutting_down" in output
    assert not list((served_jobs.jobs.paths.root / "files").glob(".upload-*"))


def test_checks_that_fail_are_not_the_callers_business(client: Client, served_jobs: JobsServer) -> None:
    """A phase that ends without an answer is an opaque internal error; the cause is in the log alone (S7)."""
    crashing = served_jobs.file(b"crash row\n")

    with pytest.raises(Internal) as caught:
        client.files.validate(crashing, model="tiny")

    assert "cause" not in str(caught.value)
    until(lambda: "a cause that only the log may tell" in served_jobs.server.output())


def test_R6_a_caller_that_leaves_ends_its_check(client: Client, served_jobs: JobsServer, tmp_path: Path) -> None:
    """A check whose caller has gone is killed, and others have their turn."""
    hanging = served_jobs.file(b"hang row\n")
    good = served_jobs.file()

    for _ in range(3):  # more than run at once
        with pytest.raises(DeadlineExceeded):
            client.files.validate(hanging, model="tiny", timeout=1.0)

    assert client.files.validate(good, model="tiny").ok


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_companion_is_started_again_later_and_later(tmp_path: Path) -> None:
    """One that dies at once is started again after 1, 2, 4 s; none is started once the server ends."""
    script = tmp_path / "script.py"
    script.write_text("import sys; print('hello'); sys.exit(3)\n")
    clock, lines = _Clock(), []
    with selectors.DefaultSelector() as selector:
        companions = Companions(
            [Companion(name="worker", argv=(sys.executable, str(script)))],
            selector=selector,
            on_output=lambda name, line: lines.append((name, line)),
            clock=clock,
        )
        companions.start()
        starts = []
        for wait_s in (1.0, 2.0, 4.0):
            until(lambda: companions.check() or not companions.running)
            clock.now_s += wait_s - 0.1
            companions.check()
            early = companions.running
            clock.now_s += 0.2
            companions.check()
            starts.append((early, companions.running))
        companions.terminate()
        until(lambda: companions.check() or not companions.running)
        clock.now_s += 100.0
        companions.check()
        last = companions.running
        companions.close()

    assert starts == [(0, 1), (0, 1), (0, 1)]
    assert last == 0
    assert lines.count(("worker", "hello")) >= 3


def test_serve_with_jobs_runs_a_front_and_a_worker(tmp_path: Path) -> None:
    """`--jobs` makes the store, names the front with jobs, a worker with every base model, and the catalogue."""
    engine = EngineConfig(model="/models/tiny", served_name="tiny")
    config = ServeConfig(engines=(engine,), jobs=JobsConfig(store=str(tmp_path / "new" / "store"), slots=2))

    started = launch(config)
    none = launch(config.model_copy(update={"jobs": config.jobs.model_copy(update={"slots": 0})}))

    assert started.front_module == "trilithon_finetune.api.front"
    assert started.config.server.catalog == str(tmp_path / "new" / "store" / "models")
    (worker,) = started.companions
    assert worker.argv[-6:] == (
        "--store",
        str(tmp_path / "new" / "store"),
        "--slots",
        "2",
        "--model",
        "tiny=/models/tiny",
    )
    assert none.companions == ()
    (tmp_path / "file").touch()
    broken = ServeConfig(engines=(engine,), jobs=JobsConfig(store=str(tmp_path / "file" / "x")))
    with pytest.raises(ConfigError, match=r"jobs\.store must be a directory"):
        launch(broken)
