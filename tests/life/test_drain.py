"""R5: SIGTERM drains, for both protocols alike; a second signal aborts."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from served import Server, serving
from under_load import Load, Processes, readiness, wait_until

from trilithon import Client
from trilithon.errors import TrilithonError

FLAGS = ("--log-format", "json", "--set", "engines.0.kv_cache_bytes=16MiB")


def refusals(server: Server) -> list[tuple[str, bool]]:
    """Code and retry advice of one new request on each protocol."""
    found = []
    for url in (server.url, server.grpc_target):
        with Client(url, max_retries=0) as client, pytest.raises(TrilithonError) as caught:
            client.generate("a", max_tokens=1)
        found.append((caught.value.code, caught.value.retry_after_s is not None))
    return found


def test_R5_in_flight_work_finishes_and_new_work_is_refused(tiny_dir: Path, sockets: Path) -> None:
    """
    After SIGTERM readiness is off and new requests are refused as `draining`, while everything in flight ends as it
    would have; then the server exits with 0 and leaves nothing.

    Inverse seen: with `client.drain()` left out of the front new requests are served and the first assertion fails.
    """
    with serving(tiny_dir, *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        processes = Processes(server)
        with Load(server, max_tokens=400) as load:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: readiness(server) == 503, seconds=2.0)
            assert refusals(server) == [("draining", True)] * 2
            load.wait(seconds=60)

        assert {"length", "max_tokens"} >= {outcome.ended for outcome in load.outcomes}
        assert all(outcome.tokens > 100 for outcome in load.outcomes if outcome.streamed)
        assert server.process.wait(20) == 0
        assert processes.left() == []
    assert list(sockets.iterdir()) == []


def test_R5_past_the_limit_requests_end_with_a_typed_reason(tiny_dir: Path, sockets: Path) -> None:
    """
    What is still running after `--drain-seconds` ends as `server_shutting_down` on both protocols, never as a shorter
    answer passed off as finished.
    """
    flags = ("--drain-seconds", "0.5s", *FLAGS)
    with serving(tiny_dir, *flags, env={"XDG_RUNTIME_DIR": str(sockets)}) as server, Load(server) as load:
        sent_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        load.wait(seconds=10)

        assert {"server_shutting_down"} == {outcome.ended for outcome in load.outcomes}
        assert all(0.4 < outcome.at_s - sent_s < 5.0 for outcome in load.outcomes)
        assert server.process.wait(20) == 0


def test_R5_a_second_signal_aborts_at_once(tiny_dir: Path, sockets: Path) -> None:
    """
    A second SIGTERM does not wait for the drain limit of 30 s.

    Inverse seen: with the second signal ignored the requests run on and the first wait fails.
    """
    with serving(tiny_dir, *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}) as server, Load(server) as load:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: readiness(server) == 503, seconds=2.0)
        assert not any(outcome.ended for outcome in load.outcomes)
        server.process.send_signal(signal.SIGTERM)
        load.wait(seconds=5.0)

        assert {"server_shutting_down"} == {outcome.ended for outcome in load.outcomes}
        assert server.process.wait(20) == 0


def test_R5_ctrl_c_is_130_and_a_signal_while_loading_ends_at_once(tiny_dir: Path, sockets: Path) -> None:
    """SIGINT drains like SIGTERM and says so by its exit code; while the model loads there is nothing to wait for."""
    with serving(tiny_dir, *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}, wait=False) as server:
        wait_until(lambda: readiness(server) == 503, seconds=60)
        processes = Processes(server)
        server.process.send_signal(signal.SIGINT)

        assert server.process.wait(15) == 130
        assert processes.left() == []
    assert list(sockets.iterdir()) == []
