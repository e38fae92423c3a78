"""Jobs on CUDA devices: what is said where there are none, and what is trained where there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_jobs import JobDir, make_job, twin, write_rows
from task_rows import rows
from tiny import tiny_llama

MakeJob = Callable[..., JobDir]
ON_CUDA = {"device": "cuda"}

# Of a GPU's fp32 against a CPU's: other orders of summation, over the steps of a short run.
FP32_TOLERANCE = 1e-5

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


def test_a_job_for_devices_that_are_not_here_is_refused(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is queued, with their number and what to do; a retry would not help."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    made = job("sft", parallel={**ON_CUDA, "dp": 2})
    error = made.try_phase("validate")["error"]

    assert error["code"] == "estimate_exceeded"
    assert error["param"] == "parallel.device"
    assert "each of the job's 2 ranks takes a CUDA device of its own. Given: 1" in error["message"]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("task", "config"),
    [("sft", {"tuning": {"kind": "lora"}}), ("sft", {"tuning": {"kind": "full"}}), ("dpo", {}), ("ner", {}),
     ("span_qa", {}), ("mlm", {}), ("answer_qa", {})],
)  # fmt: skip
def test_E8_a_gpu_learns_what_a_cpu_does(job: MakeJob, tmp_path: Path, task: str, config: dict[str, Any]) -> None:
    """Losses and validation numbers of a job are the CPU's, and its export passes the check, made on the CPU."""
    on_cpu = job(task, optimizer={"lr": 1e-3}, **config)
    on_cuda = twin(on_cpu, tmp_path / "other")
    on_cuda.configure("parallel", device="cuda")
    for made in (on_cpu, on_cuda):
        made.walk()

    assert on_cuda.losses() == pytest.approx(on_cpu.losses(), rel=FP32_TOLERANCE)
    expected, found = (made.events("eval")[-1]["data"] for made in (on_cpu, on_cuda))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_memory_of_a_device_is_foretold_and_never_under(tmp_path: Path, kind: str, dtype: str) -> None:
    """What the allocator handed out at most, beside what was said; the context is said, and not handed out."""
    model = tiny_llama(
        tmp_path / "m", layers=12, hidden=1024, heads=16, groups=4, ffn=2816, vocab=16384, context=1024, scale=0.02
    )
    train = write_rows(tmp_path / "train.jsonl", [_long(row) for row in rows("sft", 96)])
    training = {"batch_size": 48, "max_steps": 4, "micro_batch_tokens": 16384}
    made = make_job(
        tmp_path, model, train, task="sft", dtype=dtype, tuning={"kind": kind}, training=training,
        data={"max_tokens": 1024}, parallel=ON_CUDA,
    )  # fmt: skip
    parts = made.phase("validate")["estimate"]["memory_parts"]
    made.phase("prepare")
    made.train()  # in a process of its own: its peak is no other job's
    peak = max(made.numbers("peak_bytes"))

    assert peak <= sum(parts.values()) - parts["framework"] <= 1.25 * peak, (peak, parts)


def _long(row: Any) -> Any:
    """The row with an answer of some hundred tokens."""
    *before, answer = row["messages"]
    return {"messages": [*before, {**answer, "content": answer["content"] * 20}]}
