"""
A phase or a rank as far as a worker sees it: `stand_in.py NAME JOB_DIR --attempt N`.

`options` of the job's configuration say what it does, by name of the phase: `block` (until the file `go` of the job's
directory is there), `exit` (code), `error` (a record), `attempts` (in which all that happens; by default in each),
`steps`, `step_s`, `every` (checkpoints), `deaf` (to SIGTERM). Every process marks itself in `marks/`, and says there
when another one of its job and rank still runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

NAME, JOB_DIR, ATTEMPT = sys.argv[1], Path(sys.argv[2]), int(sys.argv[4])
RANK = int(os.environ.get("RANK", "0"))
JOB = json.loads((JOB_DIR / "job.json").read_text())
WISH = JOB["config"]["options"].get(NAME, {})
ACTIVE = ATTEMPT in WISH.get("attempts", [ATTEMPT])
DIRECTORY = JOB_DIR / "attempts" / str(ATTEMPT)
DIGEST = "0" * 64

asked: list[int] = []


def mark(name: str) -> None:
    with (JOB_DIR / "marks" / "log").open("a") as file:
        file.write(f"{name} {NAME} {ATTEMPT} {RANK} {os.getpid()}\n")


def event(kind: str, message: str, **data: object) -> None:
    with (DIRECTORY / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "level": "info", "message": message, "data": data}) + "\n")


def result(document: object, name: str = NAME) -> None:
    path = DIRECTORY / f"{name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(document))
    path.with_suffix(".tmp").rename(path)


def checkpoint(step: int) -> None:
    run = JOB_DIR / "run"
    run.mkdir(exist_ok=True)
    part = run / f".tmp-{ATTEMPT}"
    part.mkdir(exist_ok=True)
    (part / "weights").write_text(f"weights of step {step}")
    if (run / f"step_{step:08d}").exists():
        return
    part.rename(run / f"step_{step:08d}")
    if not Path(os.environ["TRILITHON_LEASE_FILE"]).exists():
        sys.exit(1)
    (run / ".latest").write_text(str(step))
    (run / ".latest").rename(run / "latest")
    event("checkpoint_saved", f"step {step}", step=step, digest=DIGEST, bytes=17, metrics={"valid_loss": 1.0 / step})


def block() -> None:
    mark("blocked")
    while not (JOB_DIR / "go").exists():
        if asked and not WISH.get("deaf"):
            sys.exit(143)
        time.sleep(0.01)


def train() -> None:
    steps = JOB["config"]["options"].get("steps", 3)
    latest = JOB_DIR / "run" / "latest"
    done = int(latest.read_text()) if latest.exists() else 0
    event("gang_started", "ranks have met", ranks=int(os.environ["WORLD_SIZE"]))
    event("running", "goes", total_steps=steps)
    for step in range(done + 1, steps + 1):
        time.sleep(JOB["config"]["options"].get("step_s", 0.0))
        event("step", f"step {step}", step=step, total_steps=steps, train_loss=1.0 / step,
              seconds_remaining=2 * (steps - step), trained_tokens=10 * step, tokens_per_second=5.0)  # fmt: skip
        stopping = bool(asked) and not WISH.get("deaf")
        if stopping or step == steps or step % JOB["config"]["options"].get("every", 2) == 0:
            checkpoint(step)
        if stopping:
            sys.exit(143)


def main() -> None:
    (JOB_DIR / "marks").mkdir(exist_ok=True)
    lock = (JOB_DIR / "marks" / f"alive-{RANK}").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        mark("OVERLAP")
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    mark("start")
    if ACTIVE and WISH.get("block") and WISH.get("rank", RANK) == RANK:
        block()
    if ACTIVE and "error" in WISH and WISH.get("rank", RANK) == RANK:
        result(
            {"ok": False, "error": WISH["error"], "data": {"report": {"rows": 2}}},
            f"train-{RANK}" if NAME == "train" else NAME,
        )
    if ACTIVE and "exit" in WISH and WISH.get("rank", RANK) == RANK:
        sys.exit(WISH["exit"])
    if ACTIVE and "signal" in WISH and WISH.get("rank", RANK) == RANK:
        os.kill(os.getpid(), WISH["signal"])
    if NAME == "train":
        train() if RANK == 0 else None
        return
    data: dict[str, object] = {"checks": ["all"], "max_abs": 0.0, "numbers": {"exact_match": 0.5}}
    if NAME == "validate":
        estimate = {"allowed": True, "peak_bytes_per_rank": 110}
        data = {"resolved": JOB["config"], "report": {"rows": 3}, "estimate": estimate, "seed": 7}
        data |= {"base_digest": "b" * 64, "data_digest": "d" * 64, "template_digest": "t" * 64}
    if NAME == "export":
        steps = JOB["config"]["options"].get("steps", 3)
        (JOB_DIR / "export").mkdir(exist_ok=True)
        data = {"digest": DIGEST, "bytes": 17, "kind": "adapter", "step": steps, "peak_bytes": 100}
        (JOB_DIR / "results").mkdir(exist_ok=True)
        (JOB_DIR / "results" / "step_metrics.csv").write_text("step,train_loss\n1,1.0\n")
    if NAME == "prepare":
        event("prepared", "3 rows are prepared", rows=3)
    result({"ok": True, "data": data})


main()
