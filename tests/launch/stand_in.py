"""
What a trainer does as far as a launcher sees it: `stand_in.py MODE DIRECTORY`, started as a rank.

Every rank writes its pid into `pids/` of the directory first, and `ready<N>` once it does what its mode says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MODE, DIRECTORY = sys.argv[1], Path(sys.argv[2])
RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def note(name: str, text: str = "") -> None:
    """Write a file that a test may wait for, whole."""
    path = DIRECTORY / name
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


def sleep_for_ever() -> None:
    note(f"ready{RANK}")
    while True:
        time.sleep(60)


def stop_in_order() -> None:
    """As a trainer: SIGTERM is noticed, a checkpoint is written, the code is 128 + 15."""
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    note(f"ready{RANK}")
    while not came:
        time.sleep(0.02)
    note(f"checkpoint{RANK}", str(len(came)))
    sys.exit(128 + signal.SIGTERM)


def ignore_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sleep_for_ever()


def with_helper() -> None:
    """A rank with a helper process that watches nobody."""
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note(f"pids/helper{RANK}", str(helper.pid))
    sleep_for_ever()


def fail_then_peers_complain() -> None:
    """Rank 1 fails; the others notice and complain at length, as collectives do."""
    if RANK == 1:
        print("loading shard 3")
        sys.exit("shard 3 is cut short")
    while _alive(int((DIRECTORY / "pids/1").read_text())) if (DIRECTORY / "pids/1").exists() else True:
        time.sleep(0.01)
    print("connection reset by peer")
    sys.exit(1)


def fail_when_told() -> None:
    """The same, once the file `go` is there."""
    note(f"ready{RANK}")
    while RANK == 1 and not (DIRECTORY / "go").exists():
        time.sleep(0.01)
    fail_then_peers_complain()


def fail_once() -> None:
    """The first attempt fails, the second is good."""
    note(f"attempt{ATTEMPT}-rank{RANK}", os.environ["MASTER_PORT"])
    sys.exit(1 if ATTEMPT == 0 and RANK == 0 else 0)


def invalid() -> None:
    """What no restart repairs."""
    note(f"attempt{ATTEMPT}-rank{RANK}")
    sys.exit(3)


def give_up_on_peer() -> None:
    """Rank 0 gives up on its peer, whose own failure comes later."""
    if RANK == 0:
        sys.exit(6)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGSEGV)


def talk() -> None:
    """Whole lines, a broken line, and the environment that ranks find."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    print(" ".join(f"{name}={os.environ[name]}" for name in names))
    print("no end of line", end="")


def train_in_two_jobs() -> None:
    """Train until SIGTERM and write a checkpoint; the job that finds the checkpoint finishes the run."""
    if (DIRECTORY / f"checkpoint{RANK}").exists():
        note(f"done{RANK}", os.environ.get("COLOUR", ""))
    else:
        stop_in_order()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] not in ("Z", "X")
    except OSError:
        return False


note(f"pids/{RANK}", str(os.getpid()))
MODES = {
    function.__name__: function
    for function in (
        sleep_for_ever, stop_in_order, ignore_signals, with_helper, fail_then_peers_complain, fail_when_told,
        fail_once, invalid, give_up_on_peer, talk, train_in_two_jobs,
    )
}  # fmt: skip
MODES[MODE]()
