"""The local launcher against small stand-ins for a trainer: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon_parallel.launch import LaunchError
from trilithon_parallel.launch.local import local

from .conftest import Launch, is_alive, wait_until

Start = Callable[..., Launch]


def test_ranks_find_torchruns_environment_and_print_with_their_number(launch: Start) -> None:
    """Every rank gets torchrun's variables; rank 0's lines pass as they are, others' with a prefix, none is lost."""
    code, output = launch("talk", nproc=2, num_threads=3).end()

    shared = "WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=3"
    assert code == 0
    assert sorted(output.splitlines()) == sorted(
        [
            f"RANK=0 LOCAL_RANK=0 {shared}",
            "no end of line",
            f"[rank 1] RANK=1 LOCAL_RANK=1 {shared}",
            "[rank 1] no end of line",
        ]
    )


def test_R1_first_cause_is_reported(launch: Start) -> None:
    """
    The rank that failed first is named with its code and last lines, though its peers complain too; it is recorded.

    Inverse: taking the last exit instead of the first names rank 0 or 2.
    """
    started = launch("fail_then_peers_complain", nproc=3)
    code, output = started.end()

    failure = json.loads((started.run_dir / "failures.jsonl").read_text())
    assert code == 1
    assert "launch: rank 1 exited with code 1. It wrote last:" in output
    assert (failure["rank"], failure["last_lines"]) == (1, ["loading shard 3", "shard 3 is cut short"])
    assert not any(map(is_alive, started.pids()))


def test_R1_first_cause_is_known_to_a_launcher_that_slept_through_it(launch: Start) -> None:
    """
    A launcher that finds several ranks gone at one look, since its host was busy, names the one that went first.

    Inverse seen: by the ranks' numbers, rank 0 is named, which only complained.
    """
    started = launch("fail_when_told", nproc=3)
    started.wait_ready(3)
    started.process.send_signal(signal.SIGSTOP)
    (started.directory / "go").touch()
    wait_until(lambda: not any(map(is_alive, started.pids())), "all ranks have ended")
    started.process.send_signal(signal.SIGCONT)
    code, output = started.end()

    assert code == 1
    assert "launch: rank 1 exited with code 1. It wrote last:" in output


@pytest.mark.parametrize("rank", [0, 2])
def test_R1_killed_rank_ends_the_group(launch: Start, rank: int) -> None:
    """SIGKILL of any rank: it is named, the code is 128 + 9, no other rank is left."""
    started = launch("sleep_for_ever", nproc=3, kill_s=10.0)
    started.wait_ready(3)
    os.kill(int((started.directory / f"pids/{rank}").read_text()), signal.SIGKILL)
    code, output = started.end()

    assert code == 128 + signal.SIGKILL
    assert f"launch: rank {rank} was killed by SIGKILL." in output
    assert not any(map(is_alive, started.pids()))


def test_R1_rank_that_gave_up_on_a_peer_is_not_the_cause(launch: Start) -> None:
    """
    A rank that ends with code 6 lost somebody: the one that fails differently afterwards is named.

    Inverse: without the wait for a better cause, rank 0 is blamed.
    """
    code, output = launch("give_up_on_peer", nproc=2).end()

    assert code == 128 + signal.SIGSEGV
    assert "launch: rank 1 was killed by SIGSEGV." in output


def test_restarts_all_ranks_until_one_attempt_is_good(launch: Start) -> None:
    """After a failure every rank starts again, told which attempt it is; the good end counts."""
    started = launch("fail_once", nproc=2, max_restarts=3, backoff_s=0.05)
    code, output = started.end()

    attempts = sorted(path.name for path in started.directory.glob("attempt*"))
    assert code == 0
    assert "all 2 ranks start again in 0.05 s (restart 1 of 3)" in output
    assert {"attempt0-rank0", "attempt1-rank0", "attempt1-rank1"} <= set(attempts)
    assert not any(name.startswith("attempt2") for name in attempts)


def test_what_no_restart_repairs_is_not_restarted(launch: Start) -> None:
    """Code 3 says that the input is invalid: restarts are left unused."""
    started = launch("invalid", nproc=2, max_restarts=5, backoff_s=0.05)
    code, _ = started.end()

    assert code == 3
    assert not list(started.directory.glob("attempt1*"))


def test_R5_SIGTERM_reaches_every_rank_once_and_the_launcher_waits(launch: Start) -> None:
    """
    SIGTERM is handed on once; the ranks write their checkpoints and end; nothing starts again.

    Inverse: killing at once leaves no checkpoint files.
    """
    started = launch("stop_in_order", nproc=3, max_restarts=3)
    started.wait_ready(3)
    started.process.send_signal(signal.SIGTERM)
    code, output = started.end()

    checkpoints = {path.name: path.read_text() for path in started.directory.glob("checkpoint?")}
    assert code == 128 + signal.SIGTERM
    assert checkpoints == {f"checkpoint{rank}": "1" for rank in range(3)}
    assert "start again" not in output


def test_second_signal_kills(launch: Start) -> None:
    """Ranks that don't end after the first signal are killed by the second, whatever they ignore."""
    started = launch("ignore_signals", nproc=2)
    started.wait_ready(2)
    started.process.send_signal(signal.SIGINT)
    wait_until(lambda: b"again kills" in _so_far(started), "the first signal is acknowledged")
    started.process.send_signal(signal.SIGINT)
    code, _ = started.end()

    assert code == 128 + signal.SIGINT
    assert not any(map(is_alive, started.pids()))


def test_ranks_that_never_end_are_killed_at_the_limit(launch: Start) -> None:
    """Waiting for a clean exit has an end."""
    started = launch("ignore_signals", nproc=2, stop_s=0.3)
    started.wait_ready(2)
    started.process.send_signal(signal.SIGTERM)
    code, output = started.end()

    assert code == 128 + signal.SIGKILL
    assert "ranks [0, 1] did not end within 0.3 s: killing them" in output
    assert not any(map(is_alive, started.pids()))


def test_R1_no_orphan_after_SIGKILL_of_the_launcher(launch: Start) -> None:
    """
    SIGKILL of the launcher: the ranks and their helpers end with it.

    Inverse: without the keeper the helpers stay; without PR_SET_PDEATHSIG and the keeper the ranks stay too.
    """
    started = launch("with_helper", nproc=2)
    started.wait_ready(2)
    pids = started.pids()
    os.kill(started.process.pid, signal.SIGKILL)

    assert len(pids) == 4
    wait_until(lambda: not any(map(is_alive, pids)), "ranks and helpers end")


def test_helpers_of_a_rank_end_with_the_group(launch: Start) -> None:
    """A rank's helper that ignores its parent's end is killed with the group."""
    started = launch("with_helper", nproc=2)
    started.wait_ready(2)
    started.process.send_signal(signal.SIGTERM)
    started.end()

    assert not any(map(is_alive, started.pids()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nproc": 0}, "nproc must be at least 1. Given: 0"),
        ({"nproc": 1, "max_restarts": -1}, "max_restarts must be at least 0. Given: -1"),
        ({"nproc": 1, "command": []}, "command must name a program"),
        ({"nproc": 1, "command": ["/no/such/program"]}, "'/no/such/program' cannot be started: No such file"),
    ],
    ids=["nproc", "max_restarts", "empty", "program"],
)
def test_R11_what_cannot_be_launched_is_said(options: dict[str, int], message: str, tmp_path: Path) -> None:
    """Bad arguments are refused in one sentence before or instead of a start."""
    arguments = {"command": ["true"], **options}

    with pytest.raises(LaunchError, match=message):
        local(arguments.pop("command"), run_dir=tmp_path, **arguments)  # type: ignore[arg-type]  # bad on purpose


def _so_far(started: Launch) -> bytes:
    """What the launcher has printed, read without waiting."""
    assert started.process.stdout is not None
    os.set_blocking(started.process.stdout.fileno(), False)
    return started.process.stdout.read() or b""
