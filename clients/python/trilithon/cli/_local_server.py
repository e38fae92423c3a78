"""A server of this command's own, for as long as a verb needs it: models of this machine, on a Unix socket."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from trilithon import Client
from trilithon.cli._parser import UsageError
from trilithon.errors import ConnectionFailed, Unavailable

START_S = 600.0
STOP_S = 60.0
POLL_S = 0.2


@contextlib.contextmanager
def serving(models: Sequence[str], *, dtype: str | None = None) -> Iterator[str]:
    """
    Serve models, each under the name that is given or its directory's, until the block ends.

    Args:
        models: at least one, `MODEL` or `NAME=MODEL`: of the local store, or directories.
        dtype: of all; None for the server's own choice.
    Yields:
        The address.
    Raises:
        UsageError: the server ended before it was ready; its last lines are shown.
        Unavailable: it isn't ready within ten minutes.
    """
    with tempfile.TemporaryDirectory(prefix="trilithon-") as folder:
        socket, log = Path(folder) / "http.sock", Path(folder) / "log"
        flags = ["--uds", str(socket), "--http-port", "0", "--grpc-port", "0"]
        named = [(name, path) if path else ("", name) for name, _, path in (model.partition("=") for model in models)]
        for number, (name, model) in enumerate(named):
            flags += ["--set", f"engines.{number}.served_name={name}"] if name else []
            flags += ["--set", f"engines.{number}.name=local{number}"]
            flags += ["--set", f"engines.{number}.model={model}"] if number else []
            flags += ["--set", f"engines.{number}.dtype={dtype}"] if dtype else []
        command = [sys.executable, "-m", "trilithon.cli", "serve", named[0][1], *flags]
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            url = f"http+unix://{socket}"
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None:
        with contextlib.suppress(ConnectionFailed, Unavailable), Client(url) as client:
            if client.health().ready:
                return
        if time.monotonic() > deadline:
            raise Unavailable(f"the models were not ready within {START_S:g} s.", code="loading")
        time.sleep(POLL_S)
    last = "\n".join(log.read_text("utf-8").splitlines()[-5:])
    raise UsageError(f"the models could not be served (exit code {process.returncode}):\n{last}")
