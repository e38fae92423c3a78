"""`trilithon plan`: what it answers, prints, writes and draws."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_llama

from trilithon.cli import plan as verb
from trilithon.cli._parser import Parser, UsageError
from trilithon_parallel.costs import num_parameters
from trilithon_parallel.memory import Memory
from trilithon_parallel.pictures import Event, PictureError, draw_memory, draw_timeline
from trilithon_parallel.presets import RECIPES


def run(command: str) -> int:
    """The verb with its own parser."""
    parser = Parser(prog="trilithon plan")
    verb.add_arguments(parser)
    return verb.run(parser.parse(shlex.split(command)))


def answer(capsys: pytest.CaptureFixture[str], command: str) -> Any:
    """What it says as JSON."""
    code = run(f"{command} -o json")
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out)


def test_plan_answers_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Which layout, how long, what it costs in memory, bubble and bytes, and why: plain lines without a terminal."""
    assert run("--params 175B --gpus 1024") == 0
    out = capsys.readouterr().out

    assert out.startswith(
        "174.6B parameters (96 layers, hidden 12288, 96 heads), batches of 1536 x 2048 tokens, 1024 x"
    )
    for part in (
        "A step takes",
        "300B tokens take",
        "Its time: compute",
        "Its memory:",
        "instead of",
        "rejected, needs",
    ):
        assert part in out
    heading = next(line for line in out.splitlines() if line.startswith("tp  pp"))
    assert heading.split() == [
        "tp", "pp", "dp", "micro", "chunks", "recompute", "s/step", "TFLOP/s", "MFU", "%", "bubble", "%", "GB",
        "tp", "GB", "pp", "GB", "dp", "GB", "days",
    ]  # fmt: skip
    assert "\x1b" not in out


def test_plan_on_a_terminal_is_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the layouts stand in a drawn table."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    assert run("--model gpt_7.5b") == 0
    assert "┃" in capsys.readouterr().out


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same as numbers: seconds, bytes, FLOP/s; rejected ones on request."""
    got = answer(capsys, "--model gpt_145.6b --tp 8 --pp 8 --recompute full --rejected")

    assert got["parameters"] == num_parameters(RECIPES["gpt_145.6b"].config)
    best = got["best"]
    assert (best["layout"]["tp"], best["layout"]["pp"], best["layout"]["dp"]) == (8, 8, 24)
    assert sum(best["time_s"].values()) == pytest.approx(best["step_s"])
    parts = {name: size for name, size in best["memory_bytes"]["parts"].items() if name != "stage"}
    assert sum(parts.values()) == pytest.approx(best["memory_bytes"]["total"])
    assert set(best["sent_bytes"]) == {"tensor", "pipeline", "data"}
    assert len(got["rejected"]) == got["num_rejected"]
    assert all(one["reason"] for one in got["rejected"])


def test_plan_writes_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best layout as YAML, in the names of a training configuration."""
    path = tmp_path / "layout.yaml"

    got = answer(capsys, f"--model gpt_18.4b --write {path}")

    assert got["written"] == [str(path)]
    written = yaml.safe_load(path.read_text())
    layout = got["best"]["layout"]
    assert written == {
        "layout": {
            "tp": layout["tp"],
            "pp": layout["pp"],
            "dp": layout["dp"],
            "virtual": layout["virtual"],
            "micro_batch_size": layout["micro_batch"],
            "schedule": layout["schedule"],
            "sequence_parallel": layout["sequence_parallel"],
            "recompute": layout["recompute"],
            "distributed_optimizer": layout["distributed_optimizer"],
        },
        "training": {"global_batch_size": 1024},
    }


def test_plan_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pictures, which are PNG files of some size."""
    directory = tmp_path / "new" / "pictures"

    assert run(f"--model gpt_39.1b --recompute full --pp 2 --picture-dir {directory}") == 0

    assert f"wrote {directory / 'timeline.png'}" in capsys.readouterr().out
    for name in ("memory.png", "timeline.png"):
        content = (directory / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_plan_of_a_model_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model directory is planned by its own configuration."""
    model_dir = tiny_llama(tmp_path / "model", layers=4, heads=6, groups=3, hidden=48)

    got = answer(capsys, f"--model {model_dir} --gpus 2 --global-batch-size 8 --seq-len 64 --tokens 1M")

    assert got["workload"]["config"]["num_kv_heads"] == 3
    assert got["best"]["days"] > 0


def test_plan_measures_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """On one rank the predicted step stands beside a measured one."""
    command = "--model llama_10m --gpus 1 --global-batch-size 1 --seq-len 32 --measure"

    assert run(command) == 0

    out = capsys.readouterr().out
    assert "Measured here: " in out
    assert " of it." in out


def test_plan_lists_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """Recipes and hardware by name."""
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "gpt3_175b" in out
    assert "a100-80gb, h100-sxm, here" in out
    assert run("--list -o json") == 0
    assert json.loads(capsys.readouterr().out)["hardware"] == ["a100-80gb", "h100-sxm"]


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("--model gpt9", 3, "model recipe is not known. Given: 'gpt9'"),
        ("--params many --gpus 8", 3, "a count must be a positive number"),
        ("--model gpt_1.7b --hardware tpu", 2, "hardware is not known. Given: 'tpu'"),
        ("--model gpt_1.7b --gpus 0", 2, "plan gpus must be at least 1. Given: 0"),
        ("--model gpt_1008b --gpus 8", 2, "no layout of 8 a100-80gb fits. Nearest: "),
        (
            "--model gpt_1.7b --tp 3",
            2,
            "no layout of 32 a100-80gb fits. No sizes that divide 32 are left by the constraints.",
        ),
        ("--model ./nowhere --gpus 8", 3, "model directory 'nowhere' does not exist."),
        ("--model llama_10m --gpus 2 --tp 2 --measure", 2, "a measured step has one rank. Given: 2"),
    ],
)
def test_plan_says_what_is_wrong(command: str, code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes are one sentence and an exit code, in JSON too."""
    assert run(command) == code
    assert sentence in capsys.readouterr().err
    assert run(f"{command} -o json") == code
    assert sentence in json.loads(capsys.readouterr().err)["error"]["message"]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "exactly one of --model and --params is needed"),
        ("--model gpt_1.7b --params 1B", "exactly one of --model and --params is needed"),
        ("--params 3B", "--gpus is needed: the recipe 'gpt_3b' names no number of devices"),
        ("--model gpt_1.7b --top -1", "--top must be at least 0. Given: -1"),
        ("--model gpt_1.7b --write /nowhere/x.yaml", "--write /nowhere/x.yaml cannot be written"),
    ],
)
def test_plan_usage(command: str, sentence: str) -> None:
    """What the command line lacks or has twice."""
    with pytest.raises(UsageError, match=sentence):
        run(command)


def test_picture_of_nothing_and_nowhere(tmp_path: Path) -> None:
    """Few events are labelled, none is drawn empty, and a place that cannot be written is said."""
    events = [Event(0, "F", 0, 0, 0.0, 1.0), Event(1, "F", 0, 0, 1.0, 2.0), Event(1, "B", 0, 0, 2.0, 4.0)]
    draw_timeline(events, title="two ranks", path=tmp_path / "a.svg")
    draw_timeline([], title="nothing", path=tmp_path / "b.png")

    assert "two ranks" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 1000
    assert (tmp_path / "b.png").exists()
    memory = Memory("first", weights=1e9, gradients=1e9, optimizer=1e9, activations=1e9, working=0.0, ends=0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match="cannot be written"):
        draw_memory([("a", memory)], limit_bytes=80e9, title="x", path=tmp_path / "file" / "x.png")
