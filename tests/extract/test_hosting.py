"""Finetuned models that are started by the first request for them: shared, stopped when idle, and lost alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from extracting import TEXT
from front_server import ACME, ADMIN, OTHER, bearer, write_keys
from served import Server, serving
from tiny import tiny_llama
from tiny_tasks import Task
from under_load import wait_until

from trilithon import Client, TrilithonError
from trilithon_server.catalog import Catalog, CatalogEntry

CONTEXT = 16384  # a request that fills it outlasts every test


@dataclass
class Hosted:
    """A server whose catalogue holds models of our own."""

    server: Server
    http: httpx.Client
    catalog: Catalog
    run_dir: Path

    def classify(self, model: str, *, key: str = ACME, **body: Any) -> httpx.Response:
        """Ask a classifier."""
        body = {"model": model, "texts": [TEXT], **body}
        return self.http.post("/v1/extract/classes", json=body, headers=bearer(key))

    def status(self) -> dict[str, Any]:
        """Engines by model."""
        document = self.http.get("/admin/v1/status", headers=bearer(ADMIN)).json()
        return {engine["model"]: engine for engine in document["engines"]}

    def running(self) -> set[str]:
        """Hosted models that have an engine."""
        return set(self.status()) - {"base"}

    def ready(self) -> bool:
        """Whether the server says so."""
        return self.http.get("/readyz").status_code == 200

    def ranks(self) -> list[psutil.Process]:
        """Ranks of hosted engines."""
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        return [child for child in children if any("hosted-" in word for word in command_of(child))]

    def log(self, event: str) -> list[dict[str, Any]]:
        """Log lines of one kind."""
        lines = (line for line in self.server.output().splitlines() if line.startswith("{"))
        return [line for line in map(json.loads, lines) if line["event"] == event]


def command_of(process: psutil.Process) -> list[str]:
    """The words of its command; none once it has ended."""
    try:
        words: list[str] = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
    return words


def write_catalog(folder: Path, models: dict[str, Path], *, tenant: str = "acme") -> Catalog:
    """A catalogue of whole models."""
    catalog = Catalog(folder)
    for name, path in models.items():
        entry = CatalogEntry(
            name=name,
            kind="model",
            base="base",
            base_digest="b",
            path=path,
            digest=f"d-{name}",
            tenant=tenant,
            task="classify" if ":class" in name else "",
        )
        catalog.register(entry)
    return catalog


@pytest.fixture(scope="module")
def models(task_dirs: dict[Task, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Classifiers, a model that writes, and directories that cannot be served."""
    folder = tmp_path_factory.mktemp("models")
    found = {f"ft:base:class{i}:job{i}": folder / f"class{i}" for i in range(4)}
    for path in found.values():
        shutil.copytree(task_dirs["classify"], path)
    found[WRITER] = tiny_llama(folder / "text", context=CONTEXT, seed=3)
    found[SECOND] = tiny_llama(folder / "second", context=CONTEXT, seed=4)
    for name in ("cut", "empty", "weird"):
        shutil.copytree(task_dirs["classify"], folder / name)
        found[name] = folder / name
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "empty" / "config.json").unlink()
    (folder / "weird" / "task.json").write_text('{"task": "classify", "labels": ["a", "b", "c"], "max_tokens": 32}')
    return found


CLASSES = tuple(f"ft:base:class{i}:job{i}" for i in range(4))
WRITER, SECOND = "ft:base:text:job8", "ft:base:text:job9"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configured model."""
    return tiny_llama(tmp_path_factory.mktemp("base") / "base", context=CONTEXT)


@contextlib.contextmanager
def hosting(base: Path, models: dict[str, Path], folder: Path, *flags: str) -> Iterator[Hosted]:
    """Serve the base with a catalogue of the models, two of which may run at once."""
    catalog = write_catalog(folder / "catalog", models)
    options = ["--set", f"server.catalog={folder / 'catalog'}", "--set", "server.max_hosted_models=2"]
    options += ["--api-keys-file", str(write_keys(folder)), "--kv-cache-bytes", "32MiB", "--log-format", "json"]
    options += ["--set", "server.hosted_memory_fraction=0.01"]
    with (
        tempfile.TemporaryDirectory(prefix="tri-") as run_dir,
        serving(base, *options, *flags, "--run-dir", run_dir) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        yield Hosted(server, http, catalog, Path(run_dir))
        ranks = [process.pid for process in psutil.Process(server.process.pid).children(recursive=True)]
        server.stop()
        assert not [pid for pid in ranks if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        assert not list(Path(run_dir).glob("hosted-*"))


@pytest.fixture(scope="module")
def hosted(base: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """One server for the tests that leave it well; its end leaves no process and no file behind."""
    with hosting(base, models, tmp_path_factory.mktemp("hosted")) as running:
        yield running


def generate(hosted: Hosted, model: str, **body: Any) -> httpx.Response:
    """Text from a model."""
    body = {"model": model, "prompt": "The mason", "max_tokens": 8, "temperature": 0, **body}
    return hosted.http.post("/v1/generate", json=body, headers=bearer(ACME))


class Stream:
    """A long answer of the hosted model that writes, read in a thread."""

    def __init__(self, hosted: Hosted, model: str = WRITER, *, max_tokens: int = 12_000) -> None:
        self._hosted, self._model, self._max_tokens = hosted, model, max_tokens
        self.tokens = 0
        self.ended = ""
        self._stream: Any = None
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        wait_until(lambda: self.tokens > 3 or bool(self.ended), seconds=120)
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()
        self._thread.join(60)

    def _read(self) -> None:
        try:
            with (
                Client(self._hosted.server.url, api_key=ACME, max_retries=0, timeout=300) as client,
                client.generate("a", model=self._model, max_tokens=self._max_tokens, ignore_eos=True, stream=True) as s,
            ):
                self._stream = s
                for event in s:
                    self.tokens += 1
                    self.ended = event.finish_reason or ""
        except TrilithonError as error:
            self.ended = error.code
        except Exception as error:  # closed by the test
            self.ended = self.ended or repr(error)


def test_a_model_starts_with_its_first_request(hosted: Hosted) -> None:
    """
    Many requests for one model start it once and all get its answer; the base goes on answering, readiness stays on.

    Inverse: without the table of models that load (`_hosted`) each request starts an engine of its own.
    """
    ready: list[bool] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            ready.append(hosted.ready())
            assert generate(hosted, "base").status_code == 200
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = len(hosted.log("hosting"))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: hosted.classify(CLASSES[0]), range(8)))
    done.set()
    watcher.join()

    assert [answer.status_code for answer in answers] == [200] * 8, answers[0].text
    assert len({json.dumps(answer.json()["results"]) for answer in answers}) == 1
    assert len(hosted.log("hosting")) == before + 1
    assert ready
    assert all(ready)
    assert answers[0].headers["x-trilithon-model"].startswith(f"{CLASSES[0]}@")
    metrics = hosted.http.get("/metrics", headers=bearer(ACME)).text
    assert f'trilithon_rank_up{{model="{CLASSES[0]}",pp="0",rank="0",tp="0"}} 1.0' in metrics


def test_a_whole_finetuned_model_writes(hosted: Hosted) -> None:
    """A causal model of the catalogue generates, streams and obeys a constraint; another tenant does not find it."""
    answer = generate(hosted, WRITER)
    again = generate(hosted, WRITER, constraint={"choice": ["left", "right"]})
    stranger = hosted.http.post("/v1/generate", json={"model": WRITER, "prompt": "a"}, headers=bearer(OTHER))

    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == WRITER
    assert answer.json()["choices"][0]["text"] != generate(hosted, "base").json()["choices"][0]["text"]
    assert again.json()["choices"][0]["text"] in ("left", "right")
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, "model_not_found")
    assert WRITER not in stranger.text.replace(f'no model \\"{WRITER}\\"', "")


def test_models_of_the_catalogue_are_listed_with_what_they_can(hosted: Hosted) -> None:
    """A model that has never run is listed as available with its task; one without the task names those that have."""
    data = hosted.http.get("/v1/models", headers=bearer(ACME)).json()["data"]
    rows = {row["id"]: row for row in data}
    refused = hosted.classify("base").json()["error"]
    strangers = hosted.http.get("/v1/models", headers=bearer(OTHER)).json()["data"]

    assert rows[CLASSES[3]]["capabilities"] == ["classify", "embed", "tokenize"]
    assert rows[CLASSES[3]]["state"] in ("available", "ready")
    assert refused["code"] == "unsupported_model"
    assert all(name in refused["message"] for name in CLASSES)
    assert [row["id"] for row in strangers] == ["base"]


def test_the_least_recently_used_idle_model_makes_room(hosted: Hosted) -> None:
    """
    With two at work or warm, a third takes the place of the one that was not used for longest; it comes back by itself.

    Inverse: choosing the most recently used (`max` for `min`) turns it red.
    """
    first, second, third = CLASSES[:3]
    for name in (first, second, first):
        assert hosted.classify(name).status_code == 200
    assert hosted.running() == {first, second}

    assert hosted.classify(third).status_code == 200
    assert hosted.running() == {first, third}
    assert hosted.classify(second).status_code == 200
    assert len(hosted.ranks()) == 2


def test_nothing_in_flight_is_cut_to_make_room(hosted: Hosted) -> None:
    """
    A model at work stays, however long ago it was asked for, and its stream goes on; the idle one is stopped.

    Inverse: an idle check that looks at age alone ends the stream.
    """
    with Stream(hosted) as stream:
        assert hosted.classify(CLASSES[0]).status_code == 200
        at = stream.tokens
        assert hosted.classify(CLASSES[1]).status_code == 200
        wait_until(lambda: stream.tokens > at + 20, seconds=60)

        assert hosted.running() == {WRITER, CLASSES[1]}
        assert stream.ended == ""


def test_R4_a_request_waits_for_room_and_gives_up_in_time(hosted: Hosted) -> None:
    """When all places are at work a further model is refused with its own code once the caller's deadline passes."""
    limited = Client(hosted.server.grpc_target, api_key=ACME, max_retries=0, timeout=2.0)
    with Stream(hosted), Stream(hosted, SECOND) as second, limited:
        assert second.ended == ""
        with pytest.raises(TrilithonError) as refused:
            limited.extract.classify([TEXT], model=CLASSES[2])

    assert refused.value.code in ("hosting_full", "timeout")  # the server's word, or the client's own clock
    assert hosted.classify(CLASSES[2]).status_code == 200


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut", "model.safetensors"),
        ("empty", "config.json"),
        ("weird", "task.json labels must be those"),
    ],
)
def test_R11_a_broken_directory_fails_its_own_requests(hosted: Hosted, name: str, words: str) -> None:
    """
    A model that cannot be loaded is refused with the reason and without a path, again at once; nobody else notices.
    """
    assert hosted.classify(CLASSES[0]).status_code == 200
    answers = [hosted.classify(name) for _ in range(2)]

    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "model_load_failed")
        assert words in error["message"]
        assert "/" not in error["message"]
    assert answers[0].json()["error"]["request_id"] != answers[1].json()["error"]["request_id"]
    assert hosted.ready()
    assert name not in hosted.running()
    assert hosted.classify(CLASSES[0]).status_code == 200
    assert len(hosted.log("rank_lost")) <= 1


def test_R1_losing_a_hosted_rank_fails_its_requests_and_restarts_it(hosted: Hosted) -> None:
    """
    SIGKILL: what is in flight ends typed within 5 s, readiness of the server stays on, the next request waits for the
    restart and is answered.
    """
    with Stream(hosted) as stream:
        engine = [line["engine"] for line in hosted.log("hosting") if line["model"] == WRITER][-1]
        spec = str(hosted.run_dir / f"{engine}.json")
        victim = next(process for process in hosted.ranks() if spec in command_of(process))
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        wait_until(lambda: bool(stream.ended), seconds=5)

        assert time.monotonic() - killed < 5
        assert stream.ended == "engine_lost"
        assert hosted.ready()
    assert generate(hosted, WRITER).status_code == 200
    assert hosted.status()[WRITER]["restarts"] == 1


def test_a_new_front_finds_no_engine_of_the_old_one(base: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """When the front dies its hosted ranks go with it; the next front starts them anew when they are asked for."""
    with hosting(base, models, tmp_path) as hosted:
        assert hosted.classify(CLASSES[0]).status_code == 200
        before = {process.pid for process in hosted.ranks()}
        children = psutil.Process(hosted.server.process.pid).children()
        front = next(child for child in children if "trilithon_server.front" in child.cmdline())
        front.kill()
        wait_until(lambda: not before & {process.pid for process in hosted.ranks()}, seconds=30)
        wait_until(lambda: answers(hosted), seconds=60)

        assert hosted.classify(CLASSES[0]).status_code == 200
        assert len(hosted.ranks()) == 1


def answers(hosted: Hosted) -> bool:
    """Whether the base is served."""
    try:
        return hosted.ready()
    except httpx.TransportError:
        return False


def test_R5_a_drain_lets_hosted_requests_finish(base: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """SIGTERM: what a hosted model is at goes on to its end, new requests and starts are refused as draining."""
    with hosting(base, models, tmp_path, "--set", "server.drain_seconds=60") as hosted:
        assert generate(hosted, WRITER).status_code == 200
        with Stream(hosted, max_tokens=600) as stream:
            os.kill(hosted.server.process.pid, signal.SIGTERM)
            wait_until(lambda: not hosted.ready(), seconds=10)
            refused = [hosted.classify(CLASSES[0]), generate(hosted, WRITER)]
            wait_until(lambda: bool(stream.ended), seconds=60)

        assert stream.ended == "max_tokens"
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in refused] == [(503, "draining")] * 2
