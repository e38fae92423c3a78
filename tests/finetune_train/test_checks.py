"""What a check costs: no torch, once the store knows what the machine computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_jobs import JobDir, make_job, one_core, write_rows
from task_rows import rows
from tiny import tiny_llama

from trilithon_finetune import peaks
from trilithon_finetune.config import parse_config
from trilithon_finetune.peaks import PEAKS_FILE, peak_flops, remember_peak
from trilithon_finetune.train.threads import threads_of_a_rank

CHECK = """
import sys
from pathlib import Path
from trilithon_finetune.phases.phase import run_phase
code = run_phase("validate", Path(sys.argv[1]), 1)
print("torch" in sys.modules)
sys.exit(code)
"""


@pytest.fixture
def job(tmp_path: Path) -> JobDir:
    """A job that nothing has looked at yet."""
    data = write_rows(tmp_path / "chats.jsonl", rows("sft", 8))
    return make_job(tmp_path, tiny_llama(tmp_path / "tiny"), data, task="sft", training={"epochs": 1})


def _check(job: JobDir) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(job.root)], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout.strip()


def test_a_check_loads_no_torch_once_the_peak_is_known(job: JobDir) -> None:
    """
    The first check of a store measures, and keeps what it found; the next gives the same estimate without torch.

    Seen red with an import of torch at the head of the phase.
    """
    store = Path(job.spec["store"])

    first = _check(job)
    estimate = job.outcome("validate")["data"]["estimate"]
    known = json.loads((store / PEAKS_FILE).read_text())
    second = _check(job)
    again = job.outcome("validate")["data"]["estimate"]

    assert (first, second) == ("True", "False")
    assert len(known) == 1
    changing = ("disk_free_bytes", "available_bytes_per_rank")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in estimate.items() if k not in changing
    }


def test_the_largest_measurement_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's number gives way to a better one; threads, types, processors and torch have their own."""
    assert remember_peak(tmp_path, "float32", 5.0, num_threads=1) == 5.0
    assert remember_peak(tmp_path, "float32", 9.0, num_threads=1) == 9.0
    assert remember_peak(tmp_path, "float32", 7.0, num_threads=1) == 9.0
    remember_peak(tmp_path, "float32", 3.0, num_threads=2)
    remember_peak(tmp_path, "bfloat16", 4.0, num_threads=1)

    found = [
        peak_flops(tmp_path, dtype, num_threads=threads)
        for dtype, threads in (("float32", 1), ("float32", 2), ("bfloat16", 1))
    ]

    assert found == [9.0, 3.0, 4.0]
    monkeypatch.setattr(peaks, "_processor", lambda: "another processor")
    assert remember_peak(tmp_path, "float32", 1.0, num_threads=1) == 1.0


@pytest.mark.parametrize("text", ["", "[]", '{"a": "b"}', "{"])
def test_a_file_that_says_nothing_is_written_anew(tmp_path: Path, text: str) -> None:
    """What is not a table of numbers counts for nothing."""
    (tmp_path / PEAKS_FILE).write_text(text)

    assert remember_peak(tmp_path, "float32", 2.0, num_threads=1) == 2.0
    assert peak_flops(tmp_path, "float32", num_threads=1) == 2.0


def test_a_run_remembers_what_it_measured(job: JobDir) -> None:
    """The ranks measure in any case; the store has the larger of that and what a check found."""
    config = parse_config(job.spec["config"])
    store = Path(job.spec["store"])
    for phase in ("validate", "prepare"):
        job.phase(phase)
    with one_core():
        threads = threads_of_a_rank(config)
    remember_peak(store, config.dtype, 1.0, num_threads=threads)

    job.train_here()

    assert peak_flops(store, config.dtype, num_threads=threads) > 1e6
