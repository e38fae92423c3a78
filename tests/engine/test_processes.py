"""Ranks as processes: how they start, end, lose each other, and what a bad front can't do (R1, R6, R11, S2)."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_driver import Driver, make_sampling

from trilithon_server.engine.framing import FrameReader, frame
from trilithon_server.engine.local import LocalEngine, LocalEngineError
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Abort, Control, Finish, FromEngine, Submit, ToEngine

PROMPT = list(range(5, 45))
EXIT_BOUND_S = 5.0  # within which ranks notice that another is gone


def make_spec(model_dir: Path, **changes: Any) -> EngineSpec:
    return EngineSpec(name="test", model_dir=str(model_dir), kv_cache_bytes=4 << 20, num_threads=1, **changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Iterator[tuple[LocalEngine, Path]]:
    """Two pipeline stages that several tests share, and their run directory."""
    run_dir = tmp_path_factory.mktemp("run")
    with LocalEngine(make_spec(tiny_dir, pp=2), run_dir=run_dir) as engine:
        yield engine, run_dir


def wait_for_exits(engine: LocalEngine, *, bound_s: float) -> list[int]:
    end_s = time.monotonic() + bound_s
    return [process.wait(max(0.01, end_s - time.monotonic())) for process in engine.ranks]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_R1_a_rank_that_loses_a_peer_exits_6_with_its_cause(tiny_dir: Path, tp: int, pp: int, victim: int) -> None:
    """SIGKILL any rank while it works: the other one exits with 6 in bounded time and says whom it waited for.

    Inverse seen red: swallow CollectiveError in the rank's main function (it then exits with 1).
    """
    with LocalEngine(make_spec(tiny_dir, tp=tp, pp=pp)) as engine:
        driver = Driver(engine)
        driver.submit(PROMPT, sampling={"max_tokens": 400})
        driver.run(until=lambda: driver.num_steps >= 3)
        engine.ranks[victim].kill()
        codes = wait_for_exits(engine, bound_s=EXIT_BOUND_S)

        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 6
        assert "rank" in engine.log(1 - victim)
        with pytest.raises(LocalEngineError, match=f"rank {victim} exited with -9"):
            driver.run()


def test_R1_an_idle_rank_that_loses_a_peer_exits_too(tiny_dir: Path) -> None:
    """Without any request the once-a-second sign of life finds the loss."""
    with LocalEngine(make_spec(tiny_dir, tp=2)) as engine:
        engine.ranks[1].kill()

        assert wait_for_exits(engine, bound_s=EXIT_BOUND_S)[0] == 6


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_R5_ranks_drain_and_exit_0(tiny_dir: Path, tp: int, pp: int) -> None:
    """After DRAIN the running request is finished, new ones are refused, and every rank exits with 0."""
    with LocalEngine(make_spec(tiny_dir, tp=tp, pp=pp)) as engine:
        driver = Driver(engine)
        running = driver.submit(PROMPT, sampling={"max_tokens": 40})
        driver.run(until=lambda: driver.num_steps >= 2)
        engine.send(ToEngine(control=Control(kind=Control.DRAIN)))
        late = driver.submit(PROMPT)
        driver.run()

        assert len(driver.answers[running, 0].tokens) == 40
        assert driver.answers[late, 0].last.error.code == "engine_lost"
        assert set(wait_for_exits(engine, bound_s=EXIT_BOUND_S)) == {0}


def test_R5_sigterm_drains_the_leader_and_is_ignored_by_the_others(tiny_dir: Path) -> None:
    """SIGTERM to every rank, as torchrun sends it: the answer in flight is finished, then all exit with 0."""
    with LocalEngine(make_spec(tiny_dir, pp=2)) as engine:
        driver = Driver(engine)
        running = driver.submit(PROMPT, sampling={"max_tokens": 40})
        driver.run(until=lambda: driver.num_steps >= 2)
        for process in reversed(engine.ranks):
            process.send_signal(signal.SIGTERM)
        driver.run()

        assert len(driver.answers[running, 0].tokens) == 40
        assert wait_for_exits(engine, bound_s=EXIT_BOUND_S) == [0, 0]


def test_R6_a_front_that_leaves_takes_its_requests_along(pair: tuple[LocalEngine, Path]) -> None:
    """When a connection closes its requests are aborted, plans in flight included; another front goes on.

    Inverse seen red: ignore the end of a connection (the request then runs to its end and holds its blocks).
    """
    engine, run_dir = pair
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(str(engine.spec.socket_path(run_dir)))
        submit = Submit(handle=1, prompt=PROMPT, sampling=make_sampling(max_tokens=400, num_sequences=2, temperature=1))
        other.sendall(frame(ToEngine(submit=submit).SerializeToString()))
        reader, steps = FrameReader(), 0
        while steps < 4:
            steps += len(reader.feed(other.recv(65536)))
    driver = Driver(engine)
    driver.answer(PROMPT, sampling={"max_tokens": 5})

    assert driver.stats.running == 0
    assert driver.stats.blocks_in_use == 0


def test_R6_aborts_reach_plans_in_flight(pair: tuple[LocalEngine, Path]) -> None:
    """With two plans in flight an abort ends its request at once, and its blocks are free when the plan returns."""
    engine, _run_dir = pair
    driver = Driver(engine)
    handles = [driver.submit(PROMPT, sampling={"max_tokens": 300}) for _ in range(4)]
    driver.run(until=lambda: driver.num_steps >= 5)
    for handle in handles:
        driver.abort(handle)
    driver.run()
    driver.answer(PROMPT, sampling={"max_tokens": 2})

    assert all(driver.answers[handle, 0].last.finish == Finish.CANCELLED for handle in handles)
    assert driver.stats.blocks_in_use == 0


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff\xff\xff\xff",
        frame(b"\xff\xff\xff"),
        frame(b""),
        frame(ToEngine(abort=Abort(handle=77)).SerializeToString()),
    ],
    ids=["absurd length", "no message", "empty", "unknown handle"],
)
def test_S9_junk_on_the_socket_does_not_hurt_the_engine(pair: tuple[LocalEngine, Path], junk: bytes) -> None:
    """Whatever a front sends, the next one is answered."""
    engine, run_dir = pair
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(str(engine.spec.socket_path(run_dir)))
        other.sendall(junk)
        hello = FrameReader().feed(other.recv(65536))[0]

    assert FromEngine.FromString(hello).hello.pp == 2
    assert len(Driver(engine).answer(PROMPT).tokens) == 12


def test_S2_ranks_listen_on_loopback_and_on_a_private_socket(pair: tuple[LocalEngine, Path]) -> None:
    """Every TCP socket that a rank listens on is bound to 127.0.0.1; the Unix socket is the owner's alone."""
    engine, run_dir = pair
    mode = stat.S_IMODE(os.stat(engine.spec.socket_path(run_dir)).st_mode)
    owned = set()
    for process in engine.ranks:
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            target = os.readlink(entry)
            if target.startswith("socket:["):
                owned.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[9] in owned]

    assert mode == 0o600
    assert listening
    assert all(address.startswith("0100007F:") for address in listening)


def _run_rank(tmp_path: Path, spec: EngineSpec) -> tuple[int, list[dict[str, Any]], str]:
    """Start one rank as the supervisor does, with a status pipe; its exit code, events and output."""
    path = tmp_path / "spec.json"
    path.write_text(spec.to_json(), encoding="utf-8")
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "trilithon_server.engine.rank", "--spec", str(path)]
    try:
        done = subprocess.run(
            [*command, "--run-dir", str(tmp_path / "run"), "--status-fd", str(writer)],
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        events = [json.loads(line) for line in pipe.read().splitlines()]
    return done.returncode, events, done.stderr.decode()


@pytest.mark.parametrize("broken", ["missing", "truncated", "memory", "layout"])
def test_R11_a_rank_that_cannot_serve_exits_3_and_says_why(tmp_path: Path, tiny_dir: Path, broken: str) -> None:
    """A broken model, a layout that does not fit or too little memory: a `fatal` event, one sentence, no traceback."""
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    for file in tiny_dir.iterdir():
        data = file.read_bytes()
        cut = broken == "truncated" and file.suffix == ".safetensors"
        (model_dir / file.name).write_bytes(data[: len(data) // 2] if cut else data)
    spec = {
        "missing": make_spec(tmp_path / "nowhere"),
        "truncated": make_spec(model_dir),
        "memory": EngineSpec(name="test", model_dir=str(model_dir), kv_cache_bytes=1 << 50),
        "layout": make_spec(model_dir, max_context=100_000),
    }[broken]
    code, events, output = _run_rank(tmp_path, spec)

    assert code == 3
    assert events[-1]["event"] == "fatal"
    assert events[-1]["message"]
    assert events[-1]["hint"]
    assert "Traceback" not in output


def test_start_up_reports_its_phases_and_memory(tmp_path: Path, tiny_dir: Path) -> None:
    """The hello holds each phase's seconds and a memory sum that fits."""
    with LocalEngine(make_spec(tiny_dir), run_dir=tmp_path) as engine:
        hello = engine.hello

        assert set(hello.startup_seconds) == {"import", "rendezvous", "weights", "warmup", "kv"}
        memory = dict(hello.memory_bytes)
        assert memory["kv"] <= 4 << 20
        assert sum(memory.values()) - memory["available"] <= memory["available"]
        assert hello.kv_capacity_tokens % 16 == 0
    assert not engine.spec.socket_path(tmp_path).exists()
