"""A real server with a tiny model, and Debian's Chromium. Every page is checked at the end of its test."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browser.jobs_site import KEY as JOBS_KEY
from browser.jobs_site import KEYS as JOBS_KEYS
from browser.jobs_site import PATIENCE_MS, Site, Wire, enter_key
from browser.pages import Server, Watched, serve
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright
from tiny import tiny_llama

from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.paths import StorePaths

CHROMIUM_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
API_KEY = "sk-browser-test"  # of a server that lives as long as one test session, on loopback


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """
    One headless browser for a module's tests; each test has a context of its own.

    Not for the session: while playwright's synchronous API is open, its event loop counts as running, and no other
    test could run one.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_ARGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights, with a chat template."""
    return tiny_llama(tmp_path_factory.mktemp("browser") / "tiny-llama", context=4096)


def free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(2)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        first, second = (probe.getsockname()[1] for probe in probes)
    return first, second


@pytest.fixture(scope="session")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys. `TRILITHON_TEST_URL` names a running one to use instead, while working on the page."""
    running = os.environ.get("TRILITHON_TEST_URL")
    if running:
        yield Server(running.rstrip("/"))
        return
    folder = tmp_path_factory.mktemp("plain")
    with serve(model_dir, free_ports(), folder / "server.log", "--set", f"server.store={folder / 'store'}") as started:
        yield started


@pytest.fixture(scope="session")
def keyed_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants a key, whose pages are public."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{API_KEY} tenant=test scopes=user+admin\n")
    flags = ("--api-keys-file", str(keys), "--public-ui")
    with serve(model_dir, free_ports(), folder / "server.log", *flags, key=API_KEY) as started:
        yield started


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Watched]]:
    """A function that opens a page of a server in a fresh context; all of them are checked and closed at the end."""
    opened: list[tuple[BrowserContext, Watched]] = []

    def open_page(
        server: Server,
        path: str = "/",
        *,
        width: int = 1280,
        height: int = 800,
        scheme: str = "light",
        goto: bool = True,
    ) -> Watched:
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            permissions=["clipboard-read", "clipboard-write"],
            reduced_motion="reduce",
        )
        context.set_default_timeout(20_000)
        watched = Watched(context.new_page(), server.origin)
        opened.append((context, watched))
        watched.start()
        if goto:
            watched.page.goto(server.origin + path)
            if path == "/":
                watched.page.wait_for_selector("#empty h1")
        return watched

    yield open_page
    try:
        for _, watched in opened:
            watched.check()
    finally:
        for context, _ in opened:
            context.close()


@pytest.fixture(scope="session")
def served_site(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with jobs, whose worker is the test."""
    folder = tmp_path_factory.mktemp("jobs")
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(JOBS_KEYS)
    flags = ("--api-keys-file", str(keys), "--public-ui", "--jobs", str(folder / "store"), "--set", "jobs.slots=0")
    with serve(model_dir, free_ports(), folder / "server.log", *flags, key=JOBS_KEY) as server:
        jobs = Jobs(None, StorePaths(folder / "store"))
        yield Site(server, jobs, model_dir)
        jobs.close()


@pytest.fixture
def site(served_site: Site) -> Iterator[Site]:
    """The server with jobs; what a test has left running is ended behind it."""
    expect.set_options(timeout=PATIENCE_MS)
    yield served_site
    expect.set_options(timeout=5_000)
    served_site.end()


@pytest.fixture
def wire(site: Site) -> Iterator[Wire]:
    """A connection to the server that can be cut."""
    relay = Wire(int(site.server.origin.rpartition(":")[2]))
    yield relay
    relay.close()


@pytest.fixture
def show(site: Site, visit: Callable[..., Watched]) -> Callable[..., Watched]:
    """A function that opens the page, at a job or a form, and gives it the key."""

    def open_page(at: str = "", *, server: Server | None = None, **options: Any) -> Watched:
        watched = visit(server or site.server, f"/jobs{'#' if at else ''}{at}", **options)
        watched.page.set_default_timeout(PATIENCE_MS)
        enter_key(watched.page)
        return watched

    return open_page
