"""Requests that run while a test does something to their server, and what is known of the server's processes."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from served import Server

from trilithon import Client
from trilithon.errors import TrilithonError

LONG = 6000  # tokens; a tiny model makes some hundreds a second, so this outlasts every test


@dataclass
class Outcome:
    """How one request ended: its error's code or finish reason, tokens before that, and the moment."""

    protocol: str
    streamed: bool
    ended: str = ""
    advised_retry: bool = False
    tokens: int = 0
    at_s: float = 0.0
    error: str = ""


class Load:
    """
    Requests over both protocols, streamed and plain, each in a thread of its own.

    Args:
        server: where they go.
        max_tokens: of each.
        streams, plain: how many of each per protocol.
        running: entering waits until every request has been admitted and this many streams have had a token; None:
            all of them.
    """

    def __init__(
        self, server: Server, *, max_tokens: int = LONG, streams: int = 1, plain: int = 1, running: int | None = None
    ) -> None:
        self._server = server
        self._running = 2 * streams if running is None else running
        self._max_tokens = max_tokens
        self.outcomes: list[Outcome] = []
        self._threads: list[threading.Thread] = []
        for url in (server.url, server.grpc_target):
            for streamed in [True] * streams + [False] * plain:
                outcome = Outcome(url.partition(":")[0], streamed)
                self.outcomes.append(outcome)
                self._threads.append(threading.Thread(target=self._ask, args=(url, outcome), daemon=True))

    def __enter__(self) -> Load:
        first, *others = self._threads
        first.start()
        if self._running:  # a queue of one has room for the second only once the first has left it
            wait_until(lambda: bool(self.outcomes[0].tokens or self.outcomes[0].ended), seconds=60)
        for thread in others:
            thread.start()
        wait_until(lambda: sum(bool(o.tokens or o.ended) for o in self.outcomes) >= self._running, seconds=60)
        wait_until(lambda: self._admitted() >= len(self.outcomes), seconds=60)
        return self

    def __exit__(self, *error: object) -> None:
        self.wait(seconds=60)

    def _admitted(self) -> int:
        ended = sum(bool(outcome.ended) for outcome in self.outcomes)
        return ended + int(gauge(self._server, "requests_running") + gauge(self._server, "requests_waiting"))

    def wait(self, *, seconds: float) -> None:
        """Return when every request has ended; AssertionError when one has not within `seconds`."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), f"still running: {self.outcomes}"

    def _ask(self, url: str, outcome: Outcome) -> None:
        try:
            with Client(url, max_retries=0, timeout=300) as client:
                wait_until(lambda: _reaches(client), seconds=30)  # on a loaded machine a first connect may time out
                if outcome.streamed:
                    for event in client.generate("a", stream=True, max_tokens=self._max_tokens, ignore_eos=True):
                        outcome.tokens += 1
                        outcome.ended = event.finish_reason or ""
                else:
                    done = client.generate("a", max_tokens=self._max_tokens, ignore_eos=True)
                    outcome.ended = done.finish_reason or ""
        except TrilithonError as error:
            outcome.ended, outcome.error = error.code, str(error)
            outcome.advised_retry = error.retry_after_s is not None
        except Exception as error:  # a thread's own failure must reach the assertions
            outcome.ended = repr(error)
        finally:
            outcome.at_s = time.monotonic()


class Processes:
    """The processes of one server at one moment."""

    def __init__(self, server: Server) -> None:
        self.supervisor = psutil.Process(server.process.pid)
        self.all = [self.supervisor, *self.supervisor.children(recursive=True)]
        self.front = next(process for process in self.all if "trilithon_server.front" in process.cmdline())
        self._ranks = [process for process in self.all if "trilithon_server.engine.rank" in process.cmdline()]

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        return next(process for process in self._ranks if _environ(process.pid).get("RANK") == str(rank))

    def shared_memory(self) -> set[Path]:
        """Files below /dev/shm that these processes have mapped."""
        found = set()
        for process in self.all:
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            found |= {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if "/dev/shm/" in line}
        return found

    def left(self) -> list[psutil.Process]:
        """Those that still run."""
        return [process for process in self.all if _runs(process)]

    def ranks_left(self) -> list[psutil.Process]:
        """Those of the engine that still run."""
        return [process for process in self._ranks if _runs(process)]


def readiness(server: Server) -> int:
    """Status of `/readyz`, 0 when nothing answers."""
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5).status_code
    except httpx.TransportError:
        return 0


def gauge(server: Server, name: str) -> float:
    """The value of a metric that has one series."""
    lines = httpx.get(f"{server.url}/metrics", timeout=5).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"trilithon_{name}{{"))


def wait_until(condition: object, *, seconds: float) -> None:
    """Poll until `condition()` holds; AssertionError after `seconds`."""
    assert callable(condition)
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"did not hold within {seconds} s"
        pause.wait(0.005)


def _reaches(client: Client) -> bool:
    try:
        return bool(client.health())
    except TrilithonError:
        return False


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _environ(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it is gone."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode().split("=", 1) for entry in entries if b"=" in entry)
