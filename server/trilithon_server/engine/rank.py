"""
One rank of an engine: `python -m trilithon_server.engine.rank --spec FILE --run-dir DIR [--status-fd N]`.

Started by the supervisor or by torchrun, with torchrun's environment variables. Exit codes: 0 drained, 1 a bug,
3 the model or the configuration is invalid, 6 another rank is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from trilithon_parallel.launch.ending import end_process

EXIT_DRAINED = 0
EXIT_BUG = 1
EXIT_INVALID = 3
EXIT_PEER_LOST = 6


class StatusPipe:
    """JSON lines to whoever started this rank; nothing where nobody listens (under torchrun)."""

    def __init__(self, fd: int | None, *, rank: int) -> None:
        self._fd = fd
        self._rank = rank

    def send(self, event: str, **fields: Any) -> None:
        """Write one event."""
        if self._fd is None:
            return
        line = json.dumps({"event": event, "rank": self._rank, **fields}) + "\n"
        with contextlib.suppress(OSError):  # the reader's death is noticed elsewhere
            os.write(self._fd, line.encode())

    def phase(self, name: str, seconds: float) -> None:
        """A phase of the start has ended."""
        self.send("phase", name=name, seconds=round(seconds, 4))


def main(arguments: list[str] | None = None) -> int:
    """Run a rank until it is drained or fails; returns the exit code."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="trilithon_server.engine.rank")
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--status-fd", type=int)
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    status = StatusPipe(options.status_fd, rank=rank)
    # A rank ends by its leader's word, by its supervisor's SIGKILL, or with its parent. The leader drains on SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return _run(options.spec, options.run_dir, status, began)
    except Exception as error:  # the edge: whatever it is, its cause is told before this rank goes
        return _fail(error, status, rank)


def _run(spec_path: Path, run_dir: Path, status: StatusPipe, began: float) -> int:
    from trilithon_server.engine.children import die_with_parent

    die_with_parent()
    from trilithon_parallel import rendezvous
    from trilithon_parallel.backend.native import unavailable_reason
    from trilithon_parallel.grid import Grid
    from trilithon_server.engine import startup
    from trilithon_server.engine.beats import BeatWriter
    from trilithon_server.engine.channel import Channel
    from trilithon_server.engine.connections import Connections
    from trilithon_server.engine.leader import Leader, follow
    from trilithon_server.engine.spec import EngineSpec
    from trilithon_server.engine.wire_pb2 import FromEngine

    spec = EngineSpec.load(spec_path)
    import_s = time.monotonic() - began
    status.phase("import", import_s)
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    beats = BeatWriter(spec.beats_path(run_dir), rank=rank, num_ranks=spec.world_size)

    began = time.monotonic()
    world = rendezvous.join(device=spec.device, timeout_s=max(spec.timeout_s, 600.0))
    device = f"{spec.device}:{world.local_rank}" if spec.device == "cuda" else spec.device
    grid = Grid.build(tp=spec.tp, pp=spec.pp, device=device)
    channel = Channel(grid, timeout_s=spec.timeout_s) if grid.world_size > 1 else None
    rendezvous_s = time.monotonic() - began
    status.phase("rendezvous", rendezvous_s)

    loaded = startup.load(spec, grid, on_phase=status.phase)
    loaded.startup_seconds |= {"import": import_s, "rendezvous": rendezvous_s}
    status.send("memory", **loaded.memory.as_dict())
    if spec.device == "cpu":
        status.send("kernels", missing=unavailable_reason())
    if rank != 0:
        assert channel is not None
        status.send("ready")
        follow(loaded.runner, channel, beats=beats, answers=rank == channel.sampling_rank)
        rendezvous.leave()
        return EXIT_DRAINED

    began = time.monotonic()
    core = loaded.core()
    connections = Connections(spec.socket_path(run_dir), greeting=FromEngine(hello=loaded.hello()).SerializeToString())
    leader = Leader(core, loaded.runner, channel=channel, connections=connections, beats=beats)
    status.phase("listen", time.monotonic() - began)
    status.send("ready")
    leader.serve()
    rendezvous.leave()
    return EXIT_DRAINED


def _fail(error: Exception, status: StatusPipe, rank: int) -> int:
    """Say why this rank goes, in words and as an exit code."""
    code, message, hint, exit_code = "internal_error", f"{type(error).__name__}: {error}", "", EXIT_BUG
    known = _known_errors()
    if isinstance(error, known["peer"]):
        code, message, exit_code = "peer_lost", str(error), EXIT_PEER_LOST
    elif isinstance(error, known["model"]):
        code, message = getattr(error, "code", "invalid"), getattr(error, "message", str(error))
        hint, exit_code = getattr(error, "hint", ""), EXIT_INVALID
    elif isinstance(error, MemoryError):
        code, message = "memory_insufficient", f"memory ran out: {error}"
    status.send("fatal", code=code, message=message, hint=hint)
    if exit_code == EXIT_BUG:
        traceback.print_exception(error, file=sys.stderr)
    print(f"rank {rank}: {message} {hint}".rstrip(), file=sys.stderr, flush=True)
    return exit_code


def _known_errors() -> dict[str, tuple[type[Exception], ...]]:
    try:
        from trilithon_parallel.collectives import CollectiveError
        from trilithon_parallel.config import ModelError
        from trilithon_parallel.rendezvous import RendezvousError
    except ImportError:
        return {"peer": (), "model": ()}
    return {"peer": (CollectiveError, RendezvousError), "model": (ModelError,)}


if __name__ == "__main__":
    end_process(main())
