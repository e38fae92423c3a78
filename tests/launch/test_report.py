"""What a run says of itself: the file that survives a resume, the lines, the live display, TensorBoard, the picture."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trilithon_parallel.curves import draw_curves
from trilithon_parallel.hardware import PRESETS
from trilithon_parallel.peak import measured_peak
from trilithon_parallel.progress import Eta, LineDisplay, LiveDisplay, make_display, sparkline
from trilithon_parallel.report import METRICS_FILE, MetricsLog, Reporter, StepMetrics, read_metrics

STEP = StepMetrics.measured(
    step=1, loss=5.25, grad_norm=1.5, learning_rate=3e-4, tokens=4096, step_s=0.5, model_flops=4e12, num_devices=4,
    peak_flops=5e12, consumed_samples=32, peak_bytes=3 << 30, predicted_bytes=4 << 30, bubble_planned=0.25,
    bubble_measured=0.3,
)  # fmt: skip


def _steps(first: int, last: int, loss: float = 5.0) -> list[StepMetrics]:
    return [replace(STEP, step=step, loss=loss, consumed_samples=32 * step) for step in range(first, last + 1)]


def _run(run_dir: Path, steps: list[StepMetrics], *, resume_step: int = 0, console: Console | None = None) -> None:
    console = console or Console(file=io.StringIO())
    with Reporter(run_dir, total_steps=10, resume_step=resume_step, console=console) as reporter:
        for metrics in steps:
            reporter.step(metrics)


def test_rates_are_those_of_the_whole_step_and_of_one_device() -> None:
    """4e12 FLOPs in 0.5 s on 4 devices are 2e12 FLOP/s of a device, 40 % of its 5e12."""
    assert (STEP.tokens_per_s, STEP.model_flops_per_s, STEP.mfu, STEP.hfu) == (8192, 2e12, 0.4, 0.4)


def test_no_peak_no_utilisation() -> None:
    """Where no peak is known, there is no MFU, neither in the file nor on the screen."""
    metrics = StepMetrics.measured(
        step=1, loss=1.0, grad_norm=1.0, learning_rate=1e-3, tokens=8, step_s=1.0, model_flops=1.0, num_devices=1,
        peak_flops=None, consumed_samples=1,
    )  # fmt: skip

    assert (metrics.mfu, metrics.hfu) == (None, None)
    assert "mfu" not in json.loads(metrics.to_json())


FLOATS = st.floats(allow_nan=False)


@given(st.builds(replace, st.just(STEP), step=st.integers(1), loss=FLOATS, mfu=st.none() | st.floats(0, 1)))
def test_a_step_survives_its_line(metrics: StepMetrics) -> None:
    """What is written is what is read, but that an infinite loss is read as NaN; the line is strict JSON."""
    line = metrics.to_json()
    read = StepMetrics.from_json(line)

    assert "\n" not in line
    assert "Infinity" not in line
    assert read == metrics if math.isfinite(metrics.loss) else math.isnan(read.loss)


def test_resume_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    """
    A run that died in step 8, half a line written, and continues from step 5 has each step once, in order.

    Inverse: keeping all lines shows steps 6 and 7 twice.
    """
    _run(tmp_path, _steps(1, 7, loss=5.0))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    _run(tmp_path, _steps(6, 10, loss=4.0), resume_step=5)

    metrics = read_metrics(tmp_path)
    assert [(item.step, item.loss) for item in metrics] == [(s, 5.0) for s in range(1, 6)] + [
        (s, 4.0) for s in range(6, 11)
    ]


def test_every_step_is_in_the_file_at_once(tmp_path: Path) -> None:
    """A step is readable as soon as it is recorded, before anything is closed."""
    log = MetricsLog(tmp_path / METRICS_FILE, resume_step=0)
    log.append(STEP)
    read = read_metrics(tmp_path)
    log.close()

    assert read == [STEP]


def test_R11_broken_metrics_are_said_with_file_and_line(tmp_path: Path) -> None:
    """A whole line that is no step is an error that names it, not silently dropped."""
    (tmp_path / METRICS_FILE).write_text(f"{STEP.to_json()}\n[1]\n")

    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 a line of metrics must be an object. Given: '\[1\]'"):
        read_metrics(tmp_path)


def test_lines_without_a_terminal(tmp_path: Path) -> None:
    """A file gets one line a step with every number, and no control codes; nothing is wrapped."""
    screen = io.StringIO()
    _run(tmp_path, _steps(6, 8), resume_step=5, console=Console(file=screen, width=40))

    lines = screen.getvalue().splitlines()
    assert lines[0] == "continues after step 5"
    assert lines[3] == (
        "step 8/10  loss 5.0000  grad norm 1.500  lr 3.000e-04  tokens/s 8,192  model FLOP/s 2.0 T  MFU 40.0%  "
        "bubble 30.0% (planned 25.0%)  memory 3.0 GiB (planned 4.0 GiB)  samples 256  ETA 1 s"
    )
    assert len(lines) == 4
    assert "\x1b" not in screen.getvalue()


def test_live_display_on_a_terminal(tmp_path: Path) -> None:
    """A terminal gets the bar, the time that is left, the numbers and the losses as blocks; lines go above it."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100, legacy_windows=False)
    with Reporter(tmp_path, total_steps=10, console=console) as reporter:
        for metrics in _steps(1, 4):
            reporter.step(replace(metrics, loss=5.0 - metrics.step))
        reporter.say("checkpoint written")

    shown = screen.getvalue()
    assert "4/10  40%  ETA 3 s" in shown
    assert "checkpoint written" in shown
    assert f"loss {sparkline([4.0, 3.0, 2.0, 1.0])}" in shown


def test_which_display(tmp_path: Path) -> None:
    """Only a console that can redraw and knows the blocks is drawn on."""
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)

    assert isinstance(make_display(terminal, total_steps=1, resume_step=0), LiveDisplay)
    assert isinstance(make_display(Console(file=io.StringIO()), total_steps=1, resume_step=0), LineDisplay)


def test_eta_leaves_the_first_step_out() -> None:
    """The first step compiles and connects: it says nothing of the rest."""
    eta = Eta(total_steps=12)
    eta.add(60.0)
    first = eta.seconds(1)
    eta.add(2.0)

    assert (first, eta.seconds(2)) == (None, 20.0)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """TensorBoard's own reader finds every step; after a resume the steps done again count once."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _run(tmp_path, _steps(1, 7, loss=5.0))
    _run(tmp_path, _steps(6, 10, loss=4.0), resume_step=5)

    accumulator = loader.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    events = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    assert events == [(s, 5.0) for s in range(1, 6)] + [(s, 4.0) for s in range(6, 11)]


def test_pictures_are_drawn_and_repeat(tmp_path: Path) -> None:
    """The end of a run leaves both pictures; several runs share one; the same numbers give the same SVG bytes."""
    _run(tmp_path / "a", _steps(1, 9))
    _run(tmp_path / "b", [*_steps(1, 4), replace(STEP, step=5, loss=math.nan, validation_loss=4.5)])
    for name in ("one.svg", "two.svg"):
        draw_curves({"tp 1": tmp_path / "a", "tp 2": tmp_path / "b"}, tmp_path / name)

    assert (tmp_path / "a/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a/loss.svg").read_text().startswith("<?xml")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize(("out", "message"), [("x.gif", "must end in one of .svg"), ("x.svg", "no run has a finished")])
def test_R11_what_cannot_be_drawn_is_said(out: str, message: str, tmp_path: Path) -> None:
    """Neither an unknown kind of picture nor an empty one is written."""
    (tmp_path / METRICS_FILE).write_text("")

    with pytest.raises(ValueError, match=message):
        draw_curves({"a": tmp_path}, tmp_path / out)


def test_peak_is_measured_and_threads_are_put_back() -> None:
    """The CPU's peak is a plausible rate, between a calculator's and a GPU's."""
    before = torch.get_num_threads()
    peak = measured_peak(torch.float32, num_threads=1, seconds=0.05)

    assert 1e9 < peak < PRESETS["a100-80gb"].peak_flops
    assert torch.get_num_threads() == before
