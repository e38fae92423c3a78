"""Ranks that torchrun starts, as on several machines: the front attaches to them, and tells of their loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
from served import COMMAND, free_ports, serving
from under_load import Load, readiness, wait_until

FLAGS = ("--tp", "2", "--set", "engines.0.kv_cache_bytes=16MiB", "--set", "engines.0.num_threads=1")


def test_R1_a_torchrun_engine_is_attached_to_and_its_loss_is_told(tiny_dir: Path, sockets: Path) -> None:
    """
    `--write-spec` tells the ranks, torchrun starts them, `--launch external` serves them; when one is killed, every
    request ends as `engine_lost` and readiness goes off; stopping the server leaves the run directory to its owner.

    Inverse seen: with the client not failing its streams at the end of the leader's socket the load never ends.
    """
    run_dir = sockets / "run"
    run_dir.mkdir(mode=0o700)
    spec = sockets / "engine.json"
    subprocess.run([*COMMAND, "serve", str(tiny_dir), *FLAGS, "--write-spec", str(spec)], check=True, timeout=60)
    (port,) = free_ports(1)
    launch = ["--nnodes", "1", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    rank = ["-m", "trilithon_server.engine.rank", "--spec", str(spec), "--run-dir", str(run_dir)]
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, *rank],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with serving(tiny_dir, *FLAGS, "--launch", "external", "--run-dir", str(run_dir)) as server:
            with Load(server, max_tokens=4) as short:
                short.wait(seconds=60)
            with Load(server) as load:
                ranks = [
                    p for p in psutil.Process(agent.pid).children() if "trilithon_server.engine.rank" in p.cmdline()
                ]
                ranks[1].kill()
                load.wait(seconds=10)
            wait_until(lambda: readiness(server) == 503, seconds=2)

            assert {"max_tokens"} == {outcome.ended for outcome in short.outcomes}
            assert {"engine_lost"} == {outcome.ended for outcome in load.outcomes}
            assert server.stop() == 0
        assert {path.name for path in run_dir.iterdir()} <= {"main.sock", "main.beats"}
    finally:
        agent.terminate()
        agent.wait(60)
