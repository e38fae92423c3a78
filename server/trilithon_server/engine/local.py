"""An engine of several ranks for the process that starts it: spawned on loopback, talked to, and ended."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from trilithon_server.engine.children import die_with_parent
from trilithon_server.engine.framing import FrameReader, frame
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Control, FromEngine, Hello, StepResult, ToEngine

_STARTUP_S = 600.0
_STOP_S = 20.0


class LocalEngineError(RuntimeError):
    """The ranks did not start or went away; the message holds what the first of them to go said last."""


class LocalEngine:
    """
    Ranks of one engine as child processes. A context manager; blocking; for one thread.

    Args:
        spec: what to start.
        run_dir: where the socket goes; a temporary directory of its own when None.
    Raises:
        LocalEngineError: a rank failed to start.
    """

    def __init__(self, spec: EngineSpec, *, run_dir: Path | None = None) -> None:
        self._own_dir = run_dir is None
        self._dir = Path(tempfile.mkdtemp(prefix="trilithon-")) if run_dir is None else run_dir
        self.spec = spec
        self.ranks: list[subprocess.Popen[bytes]] = []
        self._reader = FrameReader()
        self._pending: list[FromEngine] = []
        self._socket: socket.socket | None = None
        try:
            self._start()
            self.hello: Hello = self._receive(_STARTUP_S).hello
        except BaseException:
            self.close()
            raise

    def send(self, message: ToEngine) -> None:
        """Send one message to the leader."""
        assert self._socket is not None
        self._socket.sendall(frame(message.SerializeToString()))

    def steps(self, *, timeout_s: float = 120.0) -> Iterator[StepResult]:
        """Results as they come; ends with an error when nothing comes for `timeout_s`."""
        while True:
            yield self._receive(timeout_s).step

    def log(self, rank: int) -> str:
        """What a rank has printed."""
        return (self._dir / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End the ranks, by force if need be; idempotent."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self.send(ToEngine(control=Control(kind=Control.SHUTDOWN)))
            deadline_s = time.monotonic() + _STOP_S
            for process in self.ranks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline_s - time.monotonic()))
            self._socket.close()
            self._socket = None
        for process in self.ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        if self._own_dir:
            shutil.rmtree(self._dir, ignore_errors=True)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        spec_path = self._dir / f"{self.spec.name}.json"
        spec_path.write_text(self.spec.to_json(), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.spec.world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.spec.world_size),
                "LOCAL_WORLD_SIZE": str(self.spec.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            environment.pop("TORCHELASTIC_RUN_ID", None)
            command = [sys.executable, "-m", "trilithon_server.engine.rank", "--spec", str(spec_path)]
            with (self._dir / f"rank{rank}.log").open("wb") as log:
                self.ranks.append(
                    subprocess.Popen(
                        [*command, "--run-dir", str(self._dir)],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        preexec_fn=die_with_parent,
                    )
                )
        self._connect()

    def _connect(self) -> None:
        deadline_s = time.monotonic() + _STARTUP_S
        path = str(self.spec.socket_path(self._dir))
        while True:
            self._check_ranks()
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                client.connect(path)
            except OSError:
                client.close()
                if time.monotonic() > deadline_s:
                    raise LocalEngineError(f"the engine did not listen within {_STARTUP_S:g} s.") from None
                select.select([], [], [], 0.02)
            else:
                self._socket = client
                return

    def _receive(self, timeout_s: float) -> FromEngine:
        assert self._socket is not None
        deadline_s = time.monotonic() + timeout_s
        while not self._pending:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise LocalEngineError(f"the engine did not answer within {timeout_s:g} s.")
            data = self._socket.recv(1 << 18)
            if not data:
                for process in self.ranks:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(5.0)
                self._check_ranks()
                raise LocalEngineError("the leader closed the connection.")
            self._pending += [FromEngine.FromString(message) for message in self._reader.feed(data)]
        return self._pending.pop(0)

    def _check_ranks(self) -> None:
        """Raise for the first rank that is gone; one that lost a peer (6) is not the cause if another is gone too."""
        gone = {rank: code for rank, process in enumerate(self.ranks) if (code := process.poll()) is not None}
        if gone:
            rank = min(gone, key=lambda r: (gone[r] == 6, r))
            words = self.log(rank).strip().splitlines()
            raise LocalEngineError(f"rank {rank} exited with {gone[rank]}: {words[-1] if words else 'no output'}")
