"""A real server for tests: the command's own `serve`, real processes, free ports of 127.0.0.1, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from ports import free_port

START_S = 120.0  # two shared cores, cold imports of torch in every rank
STOP_S = 60.0
COMMAND = [sys.executable, "-c", "import sys; from trilithon.cli import main; sys.exit(main())"]


@dataclass
class Server:
    """A started server: its addresses, its supervisor's process and what it printed."""

    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    model: str
    log: Path
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The HTTP address."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_target(self) -> str:
        """The gRPC address, as a Trilithon client takes it."""
        return f"grpc://127.0.0.1:{self.grpc_port}"

    def output(self) -> str:
        """Everything that the server has printed."""
        return self.log.read_text()

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Poll `/readyz` until it answers 200; the server's own output is the message when it never does."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"the server exited with {self.process.returncode}:\n{self.output()}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready within {timeout_s} s:\n{self.output()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def stop(self) -> int:
        """SIGTERM, then wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


@contextlib.contextmanager
def serving(
    model: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[Server]:
    """
    Run `trilithon serve MODEL FLAGS` until the block ends.

    Args:
        model: a model directory.
        flags: further flags of `serve`; ports and one thread a rank are chosen here.
        env: environment variables beside the test's own.
        headers: kept on the `Server`, for tests that use keys.
        wait: return when ready; False returns at once.
    """
    http_port, grpc_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="trilithon-test-") as scratch:
        log = Path(scratch) / "output"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*COMMAND, "serve", str(model), "--http-port", str(http_port), "--grpc-port", str(grpc_port),
                 "--set", "engines.0.num_threads=1", *flags],
                stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=scratch,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {}),
            )  # fmt: skip
        server = Server(process, http_port, grpc_port, model.name, log, headers or {})
        try:
            if wait:
                server.wait_ready()
            yield server
        finally:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise AssertionError(f"the server did not stop within {STOP_S} s:\n{server.output()}") from None


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody listens on."""
    return [free_port() for _ in range(count)]
