"""R1 and R2: a rank dies or hangs under load."""

from __future__ import annotations

import functools
import json
import signal
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import Server, serving
from tiny import tiny_t5
from under_load import LONG, Load, Processes, readiness, wait_until

MAX_RESTARTS = 3
READINESS_S = 1.0
FAILED_S = 5.0
HANG_NOTICED_S = 4.0  # a stopped rank is given 1.5 s; the rest is for a loaded machine
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
FLAGS = ("--log-format", "json", "--set", "engines.0.kv_cache_bytes=16MiB", "--set", "limits.slow_reader_s=300")


def events(server: Server) -> list[dict[str, object]]:
    """The log lines so far."""
    return [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]


def losses(server: Server) -> list[dict[str, object]]:
    return [line for line in events(server) if line["event"] == "rank_lost"]


def _lost(server: Server, count: int) -> bool:
    return len(losses(server)) >= count


def health(channel: grpc.Channel) -> int:
    """What the health service says; UNKNOWN when the server is on its way out and says nothing."""
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    except grpc.RpcError:
        return int(health_pb2.HealthCheckResponse.UNKNOWN)
    return int(answer.status)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS, ids=[f"tp{tp}pp{pp}" for tp, pp in LAYOUTS])
def test_R1_killing_any_rank_under_load_ends_everything_typed_and_restarts(
    tp: int, pp: int, tiny_dir: Path, sockets: Path
) -> None:
    """
    SIGKILL of each rank in turn: readiness off within 1 s, every request failed as `engine_lost` within 5 s on both
    protocols, the dead rank's cause logged before any other trouble, then ready again; a fourth loss within ten
    minutes ends the server with exit code 6. Nothing is left over.

    Inverse seen: with `_check_engines` ignoring the loss it finds, a killed rank is not logged and never replaced.
    """
    ranks = tp * pp
    with (
        serving(tiny_dir, "--tp", str(tp), "--pp", str(pp), *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        for victim in range(ranks):
            processes = Processes(server)
            shared_memory = processes.shared_memory()
            with Load(server) as load:
                killed_s = time.monotonic()
                processes.rank(victim).send_signal(signal.SIGKILL)
                wait_until(lambda: readiness(server) != 200, seconds=READINESS_S)
                wait_until(lambda: health(channel) != health_pb2.HealthCheckResponse.SERVING, seconds=READINESS_S)
                load.wait(seconds=FAILED_S)

            assert [outcome for outcome in load.outcomes if outcome.ended != "engine_lost"] == []
            assert all(outcome.at_s - killed_s < FAILED_S for outcome in load.outcomes)
            # At the loss that ends the server, a request may fail by its socket before the front hears of the end, so
            # an unstreamed one may or may not be told to retry; a streamed one never is.
            final = victim == MAX_RESTARTS
            assert all(o.advised_retry is not o.streamed for o in load.outcomes if o.streamed or not final)
            # The log may come behind the answers.
            wait_until(functools.partial(_lost, server, victim + 1), seconds=FAILED_S)
            loss = losses(server)[-1]
            expected = {"rank": victim, "tp": victim % tp, "pp": victim // tp, "kind": "killed"}
            assert expected.items() <= loss.items()
            assert loss["cause"] == "killed by SIGKILL"
            first_trouble = next(e for e in events(server)[_index(events(server), victim) :] if e["level"] != "info")
            assert first_trouble["event"] == "rank_lost"
            if victim == MAX_RESTARTS:
                assert server.process.wait(30) == 6
                break
            server.wait_ready()
            assert processes.ranks_left() == []
            assert not any(path.exists() for path in shared_memory)
        last = Processes(server) if server.process.poll() is None else None
        server.stop()
        assert last is None or last.left() == []
    assert list(sockets.iterdir()) == []


def test_R1_requests_of_an_encoder_decoder_end_typed_too(tmp_path: Path, sockets: Path) -> None:
    """What its decoder writes when a rank is killed fails as `engine_lost`; then it is ready again."""
    model = tiny_t5(tmp_path / "t5", tokenizer="metaspace", config={"n_positions": 2048})
    with serving(model, "--tp", "2", *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        with Load(server, max_tokens=2000) as load:
            Processes(server).rank(1).send_signal(signal.SIGKILL)
            load.wait(seconds=FAILED_S)
        server.wait_ready()

    assert [outcome.ended for outcome in load.outcomes] == ["engine_lost"] * 4


def _index(lines: list[dict[str, object]], victim: int) -> int:
    """Where the log of the present engine begins: after the last restart's `listen` phase, or at the start."""
    starts = [i for i, line in enumerate(lines) if line["event"] == "startup_phase" and line["phase"] == "listen"]
    return starts[min(victim, len(starts) - 1)]


@pytest.mark.parametrize(("tp", "pp", "victim"), [(1, 1, 0), (2, 1, 1), (2, 2, 2)], ids=["tp1pp1", "tp2pp1", "tp2pp2"])
def test_R2_a_stopped_rank_is_noticed_named_and_replaced(
    tp: int, pp: int, victim: int, tiny_dir: Path, sockets: Path
) -> None:
    """
    SIGSTOP instead of SIGKILL: the rank that was stopped is named as hung, all requests end as `engine_lost` in
    bounded time, and the group starts again. With `--on-rank-loss exit` the same ends the server with code 6.

    Inverse seen: without the check of state T the loss comes only with the step's deadline, after this test's bound.
    """
    flags = ("--tp", str(tp), "--pp", str(pp), *FLAGS)
    with serving(tiny_dir, *flags, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        processes = Processes(server)
        with Load(server) as load:
            processes.rank(victim).send_signal(signal.SIGSTOP)
            wait_until(lambda: readiness(server) != 200, seconds=HANG_NOTICED_S)
            load.wait(seconds=FAILED_S)

        assert {"engine_lost"} == {outcome.ended for outcome in load.outcomes}
        (loss,) = losses(server)
        assert {"rank": victim, "kind": "hung", "cause": "stopped by a signal (state T)"}.items() <= loss.items()
        server.wait_ready()
        assert processes.ranks_left() == []
    assert list(sockets.iterdir()) == []


def test_R1_on_rank_loss_exit_ends_with_code_6(tiny_dir: Path, sockets: Path) -> None:
    """Told to exit, the server fails its requests typed, leaves nothing, and says why it went."""
    flags = ("--tp", "2", "--on-rank-loss", "exit", *FLAGS)
    with serving(tiny_dir, *flags, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        processes = Processes(server)
        with Load(server) as load:
            processes.rank(1).send_signal(signal.SIGKILL)
            load.wait(seconds=FAILED_S)

        assert {"engine_lost"} == {outcome.ended for outcome in load.outcomes}
        assert server.process.wait(20) == 6
        assert not any(outcome.advised_retry for outcome in load.outcomes)
        assert processes.left() == []
        (end,) = [event for event in events(server) if event["event"] == "server_ends"]
        assert "rank 1: killed by SIGKILL" in str(end["reason"])
    assert list(sockets.iterdir()) == []


def test_R1_a_dead_front_is_started_again_and_the_engine_goes_on(tiny_dir: Path, sockets: Path) -> None:
    """SIGKILL of the front: the same ports answer again, from the same ranks, which have let go of the old requests."""
    with serving(tiny_dir, *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        processes = Processes(server)
        rank = processes.rank(0)
        with Load(server) as load:
            processes.front.send_signal(signal.SIGKILL)
            load.wait(seconds=FAILED_S)
        wait_until(lambda: readiness(server) != 200, seconds=5.0)
        server.wait_ready()
        with Load(server, max_tokens=4) as short:
            short.wait(seconds=60)

        assert rank.is_running()
        assert {"length", "max_tokens"} >= {outcome.ended for outcome in short.outcomes}
        assert any(e["event"] == "front_lost" and e["cause"] == "killed by SIGKILL" for e in events(server))


def test_R1_no_child_outlives_a_killed_supervisor(tiny_dir: Path, sockets: Path) -> None:
    """
    SIGKILL of the supervisor itself takes the front and every rank with it; the next server removes what was left.

    Inverse seen: without PR_SET_PDEATHSIG the front and the ranks stay.
    """
    env = {"XDG_RUNTIME_DIR": str(sockets)}
    with serving(tiny_dir, "--tp", "2", *FLAGS, env=env) as server:
        processes = Processes(server)
        server.process.kill()
        wait_until(lambda: processes.left() == [], seconds=10.0)
        assert len(list(sockets.iterdir())) == 1
    with serving(tiny_dir, *FLAGS, env=env):
        assert len(list(sockets.iterdir())) == 1
    assert list(sockets.iterdir()) == []


def test_the_load_outlasts_the_tests() -> None:
    """The long request fits the window of the tiny model."""
    assert LONG < 8192
