"""Ranks that hang, disagree or are told to stop, for real; and the pure parts of the verdict."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import end, start_ranks

from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.health import HealthError, Signals, agree, set_deterministic
from trilithon_parallel.watchdog import EXIT_HANG, RankState, Watchdog, blame, reachable, state_path

from .conftest import Launch, is_alive, wait_until

LOOPING = Path(__file__).with_name("looping.py")
TIMEOUT_S = 2.0  # of the watchdog in looping.py


def _under_way(directory: Path, nproc: int) -> None:
    wait_until(lambda: len(list(directory.glob("step3-rank*"))) == nproc, "the ranks are under way")


def test_R2_stopped_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    """
    SIGSTOP of a rank, without our launcher: all others exit with code 6 within the limit + 5 s, naming it in words.

    Inverse: without `observing` the pending call is unknown and nobody is named; without the watchdog all hang.
    """
    processes = start_ranks(LOOPING, 3, "sum", tmp_path)
    try:
        _under_way(tmp_path, 3)
        processes[1].send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        codes = [processes[rank].wait(TIMEOUT_S + 5) for rank in (0, 2)]
        took_s = time.monotonic() - stopped_at
    finally:
        end(processes)

    reports = [state_path(tmp_path, rank).read_text() for rank in (0, 2)]
    assert codes == [EXIT_HANG, EXIT_HANG]
    assert took_s < TIMEOUT_S + 5
    for report in reports:
        assert "waiting: all_reduce 'sum' over world ranks [0, 1, 2]" in report
        assert "To blame: rank 1, which wrote no state" in report
        assert "in meet\n" in report  # the main thread's stack
    assert not state_path(tmp_path, 1).exists()


def test_R2_launcher_names_the_stopped_rank_and_starts_again(launch: Callable[..., Launch], tmp_path: Path) -> None:
    """Under the local launcher the stopped rank is the first cause, is killed, and the next attempt runs."""
    command = [sys.executable, str(LOOPING), "sum", str(tmp_path)]
    started = launch("", nproc=2, command=command, max_restarts=1, backoff_s=0.05)
    _under_way(tmp_path, 2)
    os.kill(int((tmp_path / "step3-rank1").read_text()), signal.SIGSTOP)
    for mark in tmp_path.glob("step3-rank*"):
        mark.unlink()
    _under_way(tmp_path, 2)
    started.process.send_signal(signal.SIGTERM)
    code, output = started.end()

    assert code == 128 + signal.SIGTERM
    assert "launch: rank 1 is stopped by a signal (state T); rank 0 gave up waiting first." in output
    assert "To blame: rank 1, which wrote no state" in output


def test_R2_rank_that_waits_for_nobody_is_named(tmp_path: Path) -> None:
    """A rank that is busy elsewhere (its process lives) is named with its phase; it ends too."""
    processes = start_ranks(LOOPING, 3, "busy", tmp_path)
    try:
        codes = [process.wait(60) for process in processes]
    finally:
        end(processes)

    assert codes == [EXIT_HANG] * 3
    for rank in range(3):
        report = state_path(tmp_path, rank).read_text()
        assert "To blame: rank 1, which waits for nobody (rank 1 in phase 'evaluation' of step 5)." in report


def test_other_seed_on_one_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """
    Every rank ends with the same error, which names the field, the values and the ranks.

    Inverse: comparing with rank 0 alone leaves `ranks` empty on it.
    """
    processes = start_ranks(LOOPING, 3, "seed", tmp_path)
    try:
        codes = [process.wait(60) for process in processes]
    finally:
        end(processes)

    line = (
        "ranks_disagree ('seed',) (2,) seed must be the same on all ranks. Given: '1' on ranks 0, 1, '2' on rank 2. "
        "Start every rank with the same command, code, packages and data."
    )
    assert codes == [3, 3, 3]
    assert capfd.readouterr().out.replace("\n", "") == line * 3  # ranks may write between a line and its end


def test_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    """SIGTERM to one rank alone: all agree to stop after the same step, with code 128 + 15."""
    processes = start_ranks(LOOPING, 2, "signal", tmp_path)
    try:
        _under_way(tmp_path, 2)
        processes[1].send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes]
    finally:
        end(processes)

    steps = {(tmp_path / f"stopped-rank{rank}").read_text() for rank in range(2)}
    assert codes == [143, 143]
    assert len(steps) == 1


# -- one process --------------------------------------------------------------------------------------------


def test_one_rank_agrees_with_itself() -> None:
    """Without peers every fact holds, and no process group is needed."""
    agree(Grid.single(), {"seed": "1"})


def test_watchdog_is_quiet_while_something_moves_and_speaks_when_nothing_does(tmp_path: Path) -> None:
    """Calls that begin and end count as progress; then silence gives one verdict, and the old report is kept."""
    state_path(tmp_path, 0).write_text("of the attempt before")
    axis, verdicts = Axis("dp", 0, 2, (0, 1)), list[str]()
    with Watchdog(
        rank=0, world_size=2, run_dir=tmp_path, timeout_s=0.5, first_timeout_s=0.5, on_hang=verdicts.append
    ) as watch:
        watch.step(1)
        for _ in range(20):
            watch.begin("all_reduce", "grads", axis)
            watch.end()
            time.sleep(0.05)  # twice the limit in all: progress keeps it quiet
        assert verdicts == []
        watch.begin("all_gather", "weights", axis)
        wait_until(lambda: bool(verdicts), "the hang is noticed")

    assert "rank 0 of 2 has made no progress" in verdicts[0]
    assert "it waits in all_gather 'weights' over dp ranks [0, 1]" in verdicts[0]
    assert "Last completed: all_reduce 'grads' over dp ranks [0, 1]" in verdicts[0]
    assert "To blame: rank 1" in verdicts[0]
    assert (tmp_path / "rank0.hang.before.txt").read_text() == "of the attempt before"


def test_a_long_phase_has_its_own_limit(tmp_path: Path) -> None:
    """A checkpoint may take longer than a step: its limit replaces the usual one until the next phase."""
    verdicts: list[str] = []
    with Watchdog(
        rank=0, world_size=1, run_dir=tmp_path, timeout_s=0.2, first_timeout_s=0.2, on_hang=verdicts.append
    ) as watch:
        watch.step(1)
        watch.enter("checkpoint", timeout_s=60.0)
        time.sleep(0.6)  # three times the usual limit
        quiet = verdicts == []
        watch.enter("step")
        wait_until(lambda: bool(verdicts), "the usual limit holds again")

    assert quiet
    assert "phase 'step': it waits for nobody" in verdicts[0]


STATES = st.builds(
    RankState,
    rank=st.integers(0, 9),
    step=st.integers(0, 10**9),
    phase=st.sampled_from(["forward", "step", "checkpoint: save"]),
    calls=st.integers(0, 10**12),
    waiting=st.sampled_from(["", "recv 'a: b' over pp ranks [0, 1]"]),
    waits_for=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    completed=st.sampled_from(["", "all_reduce 'g' over tp ranks [0, 1]"]),
)


@given(STATES)
def test_a_state_survives_its_file(state: RankState) -> None:
    """What is written is what is read, whatever labels contain; stacks below are ignored."""
    assert RankState.from_text(f"{state.to_text()}\nthread MainThread:\nstep: 9\n") == state


@given(st.dictionaries(st.integers(0, 9), STATES), STATES)
def test_reachable_states_are_closed_under_waiting(files: dict[int, RankState], start: RankState) -> None:
    """Whoever is waited for is in the result; a rank without a file is there as None."""
    states = reachable(start, files.get)

    for state in states.values():
        assert state is None or set(state.waits_for) <= set(states)


def test_blame_follows_the_chain_of_waits() -> None:
    """Rank 0 waits for 1, which waits for 2, which is silent: 2 is to blame, seen from 0."""
    here = RankState(0, step=1, phase="step", calls=1, waiting="all_reduce", waits_for=(1,))
    between = RankState(1, step=1, phase="step", calls=1, waiting="recv", waits_for=(2,))

    assert "To blame: rank 2," in blame(reachable(here, {1: between}.get))


def test_ranks_that_wait_in_different_places_are_listed() -> None:
    """A mismatch of collectives names both places."""
    left = RankState(0, step=4, phase="step", calls=1, waiting="send 'a'", waits_for=(1,))
    right = RankState(1, step=5, phase="step", calls=1, waiting="recv 'b'", waits_for=(0,))

    places = "rank 0 in send 'a' of step 4; rank 1 in recv 'b' of step 5"
    assert blame({0: left, 1: right}) == f"The ranks wait for each other in different places ({places})."


def test_second_signal_within_a_second_is_the_same_wish() -> None:
    """Two launchers that hand on one SIGTERM don't cut the checkpoint short."""
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    assert (signals.should_stop, signals.exit_code) == (True, 143)


def test_deterministic_mode_refuses_an_environment_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that the user set to something else is named, not overwritten."""
    monkeypatch.setenv("NCCL_ALGO", "Tree")

    with pytest.raises(HealthError, match=r"NCCL_ALGO must be one of .* Given: 'Tree'"):
        set_deterministic(num_threads=1)


def test_deterministic_mode_sets_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch, the thread count and the libraries' variables are set."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    try:
        set_deterministic(num_threads=1)
        settings = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), os.environ["NCCL_ALGO"])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)

    assert settings == (True, 1, "Ring")


def test_torchrun_restarts_all_ranks_after_one_was_killed(tmp_path: Path) -> None:
    """
    Under a real torchrun the same ranks find each other through its store, and start again when one is lost.

    Inverse: with `env://` the second attempt hangs in about half of the runs, in addresses of the first.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = subprocess.Popen([*torchrun, str(LOOPING), "sum", str(tmp_path)])
    try:
        _under_way(tmp_path, 2)
        pids = [int((tmp_path / f"step3-rank{rank}").read_text()) for rank in range(2)]
        for mark in tmp_path.glob("step3-rank*"):
            mark.unlink()
        os.kill(pids[1], signal.SIGKILL)
        _under_way(tmp_path, 2)
        again = [int((tmp_path / f"step3-rank{rank}").read_text()) for rank in range(2)]
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)

    assert not set(pids) & set(again)
    wait_until(lambda: not any(map(is_alive, [*pids, *again])), "no rank is left")
