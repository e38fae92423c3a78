"""`trilithon schedule` draws, times and traces what the simulator says."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trilithon.cli._parser import Parser, UsageError

VERB = importlib.import_module("trilithon.cli.schedule")
SIZES = ("--pp", "4", "--virtual", "2", "--micro-batches", "8")


def _run(*arguments: str) -> int:
    parser = Parser(prog="trilithon schedule")
    VERB.add_arguments(parser)
    code: int = VERB.run(parser.parse(arguments))
    return code


def test_text_shows_picture_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """A row per chunk, then the figures."""
    assert _run(*SIZES) == 0
    lines = capsys.readouterr().out.splitlines()

    assert [line[:14] for line in lines[:2]] == ["rank 0 chunk 0", "       chunk 1"]
    assert lines[-4] == "interleaved: pp 4, virtual 2, micro-batches 8"
    assert lines[-3].startswith("  time    28.5 ")
    assert lines[-2].startswith("  bubble  18.8% ")
    assert lines[-1].startswith("  kept    11 9 7 5 ")


def test_json_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """For programs: exact ops, times as numbers."""
    assert _run("--pp", "2", "--micro-batches", "2", "-o", "json") == 0

    assert json.loads(capsys.readouterr().out) == {
        "schedule": "1f1b",
        "pp": 2,
        "virtual": 1,
        "micro_batches": 2,
        "makespan": 9.0,
        "bubble": 0.5,
        "peak_activations": [2, 1],
        "ranks": [["F0.0", "F1.0", "B0.0", "B1.0"], ["F0.0", "B0.0", "F1.0", "B1.0"]],
    }


def test_trace_is_written(tmp_path: Path) -> None:
    """The timeline for chrome://tracing lands in the file."""
    assert _run(*SIZES, "--trace", str(tmp_path / "trace.json")) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]

    assert sum(event["ph"] == "X" for event in events) == 4 * 2 * 2 * 8


def test_R11_wrong_sizes_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What, the value, what is allowed; exit code 2."""
    assert _run("--pp", "2", "--virtual", "2", "--micro-batches", "4", "--schedule", "1f1b") == 2
    assert "Given: virtual = 2. Use interleaved, or virtual 1." in capsys.readouterr().err
    assert _run("--pp", "0", "--micro-batches", "4") == 2
    assert "schedule pp must be 1 or more. Given: 0." in capsys.readouterr().err
    with pytest.raises(UsageError, match="--trace must be a file that can be written"):
        _run(*SIZES, "--trace", str(tmp_path))


def test_no_torch_is_loaded() -> None:
    """Tables, simulator and verb run without torch and numpy."""
    code = (
        "import sys; import trilithon.cli.schedule; import trilithon_parallel.simulate; "
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Every console block of docs/schedules.md is its command and its output."""
    guide = (Path(__file__).resolve().parents[2] / "docs/schedules.md").read_text()
    blocks = re.findall(r"```console\n\$ trilithon schedule ([^\n]*)\n(.*?)```", guide, re.DOTALL)

    assert len(blocks) == 4
    for arguments, expected in blocks:
        assert _run(*arguments.split()) == 0
        assert capsys.readouterr().out == expected
