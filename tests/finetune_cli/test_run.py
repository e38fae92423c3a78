"""`finetune run`: a job in the foreground, interrupted, gone on with, failing. `test_docs.py` runs the real thing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trilithon.cli import _finetune_new, _finetune_run
from trilithon.cli._finetune_config import parsed
from trilithon.cli._finetune_follow import Follow, duration
from trilithon.cli._finetune_store import StoreDoor, open_store
from trilithon_finetune.jobs.settings import WorkerSettings

Run = Callable[..., Any]
STAND_IN = str(Path(__file__).parents[1] / "jobs" / "stand_in.py")
LIMIT_S = 120.0
_MAIN = threading.main_thread().ident or 0


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases that run nothing, and no check before them; `options` of the configuration say what they do."""
    settings = WorkerSettings(
        look_s=0.02,
        tick_s=0.02,
        backoff_s=0.0,
        phase_command=(sys.executable, STAND_IN),
        train_command=(sys.executable, STAND_IN, "train"),
    )
    monkeypatch.setattr(_finetune_run, "WorkerSettings", lambda **_: settings)
    estimate = {"allowed": True, "steps": 3, "memory_parts": {}}
    monkeypatch.setattr(
        "trilithon.cli._finetune_store.StoreDoor.check", lambda self, config: _finetune_new.Checked(estimate)
    )


@pytest.mark.usefixtures("stand_ins")
def test_a_job_runs_to_its_end(job_yaml: Path, run: Run) -> None:
    """Progress is on stderr, phases and steps in their order; the end says what was made and what to do with it."""
    done = run("run", job_yaml, "--store", "jobs", "--set", "options={steps: 4}")

    job_id = done.err.splitlines()[0]
    lines = [line.split(":")[0] for line in done.err.splitlines()]
    assert done.code == 0
    assert [word for word in ("validated", "prepared", "verified", "succeeded") if word not in lines] == []
    assert "step 4/4  loss 0.2500" in done.err
    assert f"{job_id} succeeded" in done.out
    assert "trilithon serve smollm2-135m-instruct --jobs" in done.out
    assert f"trilithon finetune deploy {job_id} --as NAME --store jobs" in done.out


@pytest.mark.usefixtures("stand_ins")
def test_a_job_is_checked_once(job_yaml: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `run` has checked itself no worker checks again: the job begins in the queue."""
    estimate = {"allowed": True, "steps": 3, "memory_parts": {}, "peak_bytes_per_rank": 110}
    outcome = {"report": {"rows": 3}, "estimate": estimate}

    def check(self: StoreDoor, config: Any) -> _finetune_new.Checked:
        resolved = parsed(config).model_dump(mode="json")
        return _finetune_new.Checked(estimate, outcome=outcome | {"resolved": resolved})

    monkeypatch.setattr(StoreDoor, "check", check)

    done = run("run", job_yaml, "--store", "jobs", "--set", "options={steps: 2}")

    job_id = done.err.splitlines()[0]
    marks = (Path("jobs") / "jobs" / job_id / "marks" / "log").read_text().splitlines()
    assert done.code == 0
    assert {line.split()[1] for line in marks} == {"prepare", "train", "export", "verify"}


@pytest.mark.usefixtures("stand_ins")
def test_ctrl_c_pauses_after_a_checkpoint_and_says_how_to_go_on(job_yaml: Path, run: Run) -> None:
    """The first Ctrl-C lets the job rest with exit code 130; `run ID` goes on from its checkpoint to the end."""
    with _when_it_steps(Path("jobs"), step=2):
        first = run("run", job_yaml, "--store", "jobs", "--set", "options={steps: 400, step_s: 0.05, every: 1000}")
    job_id = first.err.splitlines()[0]
    with open_store(Path("jobs"), None) as door:
        rested, saved = door.get(job_id), door.checkpoints(job_id)[0].step
        folder = door.paths.job(job_id).root
    document = json.loads((folder / "job.json").read_text())

    assert first.code == 130
    assert rested.state == "paused"
    assert f"Go on with: trilithon finetune run {job_id} --store jobs" in first.err
    assert document["config"]["options"]["steps"] == 400
    assert 2 <= saved < 400

    with _when_it_steps(Path("jobs"), step=saved + 2, job_id=job_id):
        second = run("run", job_id, "--store", "jobs")
    assert second.code == 130
    assert f"step {saved}/400" not in second.err  # what was told before is not told again
    with open_store(Path("jobs"), None) as door:
        assert door.checkpoints(job_id)[0].step > saved


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("code", "expected"),
    [("nan_loss", 4), ("invalid_training_file", 3), ("model_not_found", 2), ("rank_lost", 6), ("bug", 4)],
)
def test_a_failed_job_has_the_exit_code_of_its_cause(code: str, expected: int, job_yaml: Path, run: Run) -> None:
    """4 for a job that failed, 6 for lost ranks, and what a check before it would have said where it is the user's."""
    error = {"code": code, "message": "Something went wrong.", "hint": "Do better."}
    options = json.dumps({"prepare": {"error": error, "exit": 1}})

    done = run("run", job_yaml, "--store", "jobs", "--set", f"options={options}")
    as_json = run("run", job_yaml, "--store", "jobs", "--set", f"options={options}", "-o", "json")

    assert (done.code, done.code) == (expected, as_json.code)
    assert "failed: Something went wrong. Do better." in done.err
    assert f"What its processes said: {Path('jobs').resolve()}" in done.err
    assert as_json.json["error"]["code"] == code


@pytest.mark.usefixtures("stand_ins")
def test_only_its_own_job_is_run(job_yaml: Path, run: Run) -> None:
    """Jobs of others in the same store stay in the queue. Seen red with a queue that ignores `only`."""
    other = run("create", job_yaml, "-y", "--store", "jobs", "-o", "json").json["id"]

    assert run("run", job_yaml, "--store", "jobs").code == 0

    assert run("get", other, "--store", "jobs", "-o", "json").json["state"] == "validating"


def _when_it_steps(store: Path, *, step: int, job_id: str | None = None) -> Any:
    """While the block runs: Ctrl-C for this process as soon as a job of the store has done `step`."""
    return _Interrupt(store, step, job_id)


class _Interrupt:
    def __init__(self, store: Path, step: int, job_id: str | None) -> None:
        self._store, self._step, self._job_id = store.resolve(), step, job_id
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def _watch(self) -> None:
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            for path in self._store.glob("jobs/*/attempts/*/events.jsonl"):
                text = path.read_text()
                if f'"step": {self._step},' in text and (self._job_id is None or self._job_id in str(path)):
                    signal.pthread_kill(_MAIN, signal.SIGINT)  # as a terminal does: it wakes the main thread
                    return
            time.sleep(0.02)


def test_follow_shows_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    """The first and the last step, one now and then between, every evaluation; the time left is counted in steps."""
    now = 0.0

    def event(kind: str, **data: Any) -> Any:
        from trilithon._job_types import JobEvent

        return JobEvent(kind=kind, message=f"{kind}!", level="warn" if kind == "warning" else "info",
                        data_json=json.dumps(data))  # fmt: skip

    with Follow(clock=lambda: now) as follow:
        for step in range(1, 41):
            now += 1.0
            follow(event("step", step=step, total_steps=40, train_loss=1.0, step_seconds=2.0))
        follow(event("eval"))
        follow(event("claimed"))
        follow(event("warning"))

    lines = capsys.readouterr().err.splitlines()
    steps = [line.split("  ")[0] for line in lines[:-2]]
    assert steps == [f"step {n}/40" for n in (1, 6, 11, 16, 21, 26, 31, 36, 40)]
    assert lines[1] == "step 6/40  loss 1.0000"
    assert lines[2] == "step 11/40  loss 1.0000  58 s left"
    assert lines[-2:] == ["eval: eval!", "warning: warning: warning!"]
    assert duration(58) == "58 s"


@pytest.fixture
def worker_process(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `trilithon finetune worker`; ended by its pid."""
    started: list[subprocess.Popen[str]] = []
    code = "import sys; from trilithon.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "finetune", "worker"]

    def start(*arguments: str) -> subprocess.Popen[str]:
        started.append(subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_worker_ends_in_good_order(worker_process: Callable[..., subprocess.Popen[str]], here: Path) -> None:
    """SIGTERM ends `finetune worker` with exit code 0; its handlers are set before the store is opened."""
    worker = worker_process("--store", "jobs")
    end = time.monotonic() + LIMIT_S
    while not (here / "jobs" / "jobs.db").exists():
        assert time.monotonic() < end, "the worker never opened its store"
        time.sleep(0.05)

    worker.terminate()

    assert worker.wait(LIMIT_S) == 0
