"""A server process, and a page of it that is watched for what it must never do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Request

READY_S = 120.0

_WATCH_POLICY = """
window.policyViolations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.policyViolations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""

FOCUSED = """() => {
  const element = document.activeElement;
  if (element === document.body) return ["BODY", true];
  // A radio button is invisible under its label, which carries the outline for it.
  const marked = element.type === "radio" ? element.nextElementSibling : element;
  const name = element.id || element.name || element.className || element.tagName;
  return [name, getComputedStyle(marked).outlineStyle !== "none"];
}"""
"""Name of the element that has the focus, and whether it is outlined."""

CONTRAST = """(selectors) => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
  };
  return Object.fromEntries(selectors.map((selector) => {
    const e = document.querySelector(selector);
    const [a, b] = [luminance(channels(getComputedStyle(e).color)), luminance(ground(e))].sort((x, y) => y - x);
    return [selector, (a + 0.05) / (b + 0.05)];
  }));
}"""
"""Selectors -> the contrast of the first element of each."""


@dataclass
class Server:
    """A running server: its origin, a key where it wants one, its gRPC port and its model's name."""

    origin: str
    key: str = ""
    grpc_port: int = 8001
    model: str = ""

    def get(self, path: str) -> str:
        """The text of a GET."""
        return self._open(urllib.request.Request(self.origin + path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a JSON body."""
        headers = {"content-type": "application/json"}
        return json.loads(self._open(urllib.request.Request(self.origin + path, json.dumps(body).encode(), headers)))

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def _open(self, request: urllib.request.Request) -> str:
        if self.key:
            request.add_header("authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())


def eventually(check: Callable[[], bool], *, within_s: float = 20.0) -> bool:
    """Whether something becomes true before a deadline."""
    end = time.monotonic() + within_s
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def serve(model: Path, ports: tuple[int, int], log: Path, *flags: str, key: str = "") -> Iterator[Server]:
    """`trilithon serve` in a process of its own, ready when this yields and gone when it returns."""
    command = [sys.executable, "-m", "trilithon.cli", "serve", str(model), *flags]
    command += [
        "--http-port",
        str(ports[0]),
        "--grpc-port",
        str(ports[1]),
        "--dtype",
        "fp32",
        "--kv-cache-bytes",
        "8MiB",
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    server = Server(f"http://127.0.0.1:{ports[0]}", key, grpc_port=ports[1], model=model.name)

    def ready() -> bool:
        if process.poll() is not None:
            pytest.fail(f"the server exited with code {process.returncode}:\n{log.read_text()[-4000:]}", pytrace=False)
        try:
            return bool(server.get("/readyz"))
        except (urllib.error.URLError, OSError):
            return False

    try:
        if not eventually(ready, within_s=READY_S):
            pytest.fail(f"the server was not ready within {READY_S:.0f} s:\n{log.read_text()[-4000:]}", pytrace=False)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@dataclass
class Watched:
    """A page with what it did: requests that left its origin, script errors, console errors."""

    page: Page
    origin: str
    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def start(self) -> None:
        """Watch from before the first byte."""
        self.page.add_init_script(_WATCH_POLICY)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._on_request)

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.origin + "/", "data:", "about:")):
            self.foreign.append(request.url)
        if request.headers.get("content-type", "").startswith("application/json"):
            self.bodies.append((request.url.removeprefix(self.origin), request.post_data_json))

    def check(self) -> None:
        """What must hold at the end of every test."""
        assert self.foreign == []
        assert self.errors == []
        assert self.page.evaluate("window.policyViolations ?? []") == []
