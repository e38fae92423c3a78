"""Runs that are cut short, moved to other layouts, or go wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import poll
from finetune_jobs import JobDir, finish, twin
from safetensors.torch import load_file, save_file

from trilithon_finetune.train import rank as rank_module
from trilithon_parallel.watchdog import Watchdog

MakeJob = Callable[..., JobDir]

LAYOUTS = [
    ("sft", {"tp": 2}),
    ("dpo", {"pp": 2, "dp": 2}),
    ("span_qa", {"tp": 2}),
    ("ner", {"pp": 2}),
    ("mlm", {"dp": 2}),
    ("dpr", {"pp": 2, "dp": 2}),
    ("answer_gen", {"tp": 2}),
]


def prepared(made: JobDir) -> JobDir:
    """The job, ready to be trained."""
    made.phase("validate")
    made.phase("prepare")
    return made


@pytest.mark.parametrize(("task", "sizes"), LAYOUTS)
def test_E8_a_job_learns_the_same_at_every_layout(
    job: MakeJob, tmp_path: Path, task: str, sizes: dict[str, int]
) -> None:
    """Losses, accuracies and validation numbers of a job are those of one process, whatever its layout (1e-5)."""
    alone = prepared(job(task, count=18, optimizer={"lr": 1e-3}))
    other = twin(alone, tmp_path / "other")
    other.configure("parallel", **sizes)
    alone.train_here()
    other.train()

    assert alone.losses() == pytest.approx(other.losses(), rel=1e-5)
    if task in ("sft", "ner", "mlm"):
        assert alone.numbers("token_accuracy") == other.numbers("token_accuracy")
    numbers = [made.events("eval")[-1]["data"] for made in (alone, other)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


@pytest.mark.parametrize(("task", "sizes"), [("sft", {}), ("ner", {"dp": 2})])
def test_E9_a_killed_job_goes_on_bit_for_bit(job: MakeJob, tmp_path: Path, task: str, sizes: dict[str, int]) -> None:
    """
    After a SIGKILL of every rank in the middle, the next attempt's losses are those of a run that nobody disturbed.

    Inverse check: with the moments left at zero on a resume, the losses differ at the first step after it.
    """
    whole = prepared(job(task, training={"epochs": 4}, parallel=sizes, checkpoint={"every_steps": 2}))
    killed = twin(whole, tmp_path / "killed")
    whole.train()
    ranks = killed.start()
    poll(lambda: (killed.run / "step_00000004").is_dir(), "the second checkpoint")
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    killed.attempt = 2
    killed.train()

    assert whole.losses() == killed.losses()
    assert killed.events("running")[0]["data"]["step"] >= 4


def test_E7_a_stopped_job_goes_on_at_another_layout(job: MakeJob, tmp_path: Path) -> None:
    """SIGTERM ends a job after a checkpoint with exit code 143; it goes on at another layout within 1e-5."""
    whole = prepared(job("sft", training={"epochs": 6}, checkpoint={"every_steps": 100}))
    moved = twin(whole, tmp_path / "moved")
    whole.train_here()
    ranks = moved.start()
    poll(lambda: (moved.run / "metrics.jsonl").is_file() and len(moved.losses()) >= 2, "two steps")
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    finish(ranks, expect=143)
    stopped_at = len(moved.losses())
    moved.attempt = 2
    moved.configure("parallel", tp=2)
    moved.train()

    assert 2 <= stopped_at < 18
    assert moved.events("running")[0]["data"]["step"] == stopped_at
    assert whole.losses() == pytest.approx(moved.losses(), rel=1e-5)


def test_no_step_of_a_job_is_wasted(job: MakeJob) -> None:
    """The warm-up begins with a rate above 0 and reaches the whole rate at its last step; the last step learns too."""
    made = prepared(job("sft", training={"epochs": 4}, optimizer={"lr": 1e-3, "warmup_ratio": 0.35}))
    made.train_here()

    rates = made.numbers("learning_rate")
    assert len(rates) == 12
    # 80 rows in batches of 8, 8 and 4: a warm-up of 28 rows ends within the fourth step.
    assert rates[:4] == pytest.approx([1e-3 * 8 / 28, 1e-3 * 16 / 28, 1e-3 * 24 / 28, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0


def test_R11_a_rate_that_explodes_is_told_with_step_tensor_and_lines(job: MakeJob) -> None:
    """A loss that is not finite ends the job as its owner's mistake, naming step, parameter and rows."""
    made = prepared(job("sft", optimizer={"lr": 1e30, "clip": None, "schedule": "constant", "warmup_ratio": 0.0}))
    made.train_here(expect=1)

    error = made.outcome("train-0")["error"]
    assert (error["code"], error["kind"], error["retryable"]) == ("nan_loss", "user", False)
    assert "lora_" in error["message"]
    assert "lines " in error["message"]


def test_the_best_checkpoint_is_exported_and_patience_ends_a_job(job: MakeJob) -> None:
    """With early stopping a job that no longer gets better ends, and its best checkpoint is what it exports."""
    stop = {"every_steps": 1, "early_stop": {"patience": 2, "metric": "valid_loss"}}
    made = prepared(
        job("sft", training={"epochs": 30}, eval=stop, optimizer={"lr": 0.5, "schedule": "constant"})
    )  # fmt: skip
    made.train_here()
    step = made.phase("export")["step"]
    made.phase("verify")

    losses = {event["data"]["step"]: event["data"]["valid_loss"] for event in made.events("eval")}
    best = min(losses, key=losses.__getitem__)
    assert step == best
    assert len(made.losses()) == best + 2 < 90


@pytest.mark.parametrize("damage", ["swapped", "dropped", "scaled"])
def test_an_export_that_computes_something_else_is_caught(job: MakeJob, damage: str) -> None:
    """Factors of q and k swapped, a tensor left out, an alpha changed: none of them passes as verified."""
    made = prepared(job("sft", optimizer={"lr": 1e-2}))
    made.train_here()
    made.phase("export")
    path = made.root / "export" / "adapter_model.safetensors"
    tensors = load_file(path)
    q, k = (next(name for name in tensors if f"{leaf}_proj.lora_A" in name) for leaf in "qk")
    if damage == "swapped":
        tensors[q], tensors[k] = tensors[k], tensors[q]
    elif damage == "dropped":
        del tensors[q]
    else:
        tensors = {name: tensor * 1.5 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    outcome = made.try_phase("verify")

    assert not outcome["ok"]
    assert outcome["error"]["code"] == "verify_mismatch"


def test_R2_the_watchdog_hears_of_every_step_and_pass(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A job of one rank waits for nobody, so its steps and its passes are what shows that it is alive, evaluations too.

    Inverse seen: a trainer that is not given the watchdog is taken for hung once its first limit is over.
    """
    told: list[int] = []
    moved: list[str] = []

    class Told(Watchdog):
        def step(self, number: int) -> None:
            told.append(number)
            super().step(number)

        def moved(self) -> None:
            moved.append(self.state().phase)
            super().moved()

    monkeypatch.setattr(rank_module, "Watchdog", Told)
    made = prepared(job("sft", training={"micro_batch_tokens": 64}))
    made.train_here()

    steps = len(made.losses())
    assert told == list(range(steps))
    assert moved.count("step") >= 4 * steps  # two micro-batches a step at least, forward and backward
    assert moved.count("evaluation") >= 2
