"""docs/planner.md: its commands run, its output is what they print, its files and snippets work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from planner.papers import ROWS
from tiny import tiny_llama

from trilithon.cli import plan as verb
from trilithon.cli._parser import Parser
from trilithon_parallel.calibration import find_hardware
from trilithon_parallel.hardware import PRESETS, Hardware
from trilithon_parallel.planner import Workload, evaluate
from trilithon_parallel.presets import TABLE_1

PAGE = (Path(__file__).parents[2] / "docs" / "planner.md").read_text("utf-8")
COMMANDS = re.findall(r"^\$ trilithon plan ([^#\n]*)", PAGE, re.MULTILINE)


def run(command: str) -> int:
    """The verb with its own parser."""
    parser = Parser(prog="trilithon plan")
    verb.add_arguments(parser)
    return verb.run(parser.parse(shlex.split(command)))


def block(language: str, containing: str) -> str:
    """The page's code block that contains a text."""
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if containing in b)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the page, in an empty directory with a model."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "my-model", layers=4, context=4096)

    assert run(command) == 0, capsys.readouterr().err


def test_output_of_the_page_is_real(capsys: pytest.CaptureFixture[str]) -> None:
    """The worked example is what the command prints."""
    command, _, expected = block("console", "--params 175B").removeprefix("$ trilithon plan ").partition("\n")

    assert run(command) == 0

    assert capsys.readouterr().out.startswith(expected)


def test_written_layout_of_the_page_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML of the page is what --write writes."""
    shown = block("console", "$ cat layout.yaml").partition("$ cat layout.yaml\n")[2]
    monkeypatch.chdir(tmp_path)

    assert run("--model gpt_18.4b --write layout.yaml") == 0

    assert yaml.safe_load((tmp_path / "layout.yaml").read_text()) == yaml.safe_load(shown)


def test_calibration_of_the_page_works(tmp_path: Path) -> None:
    """The file of the page is read, and the page's table names every value that a file may have."""
    path = tmp_path / "ours.yaml"
    path.write_text(block("yaml", "measured_steps"))

    got = find_hardware(str(path))

    assert got.name == "our cluster"
    assert got.product_efficiency != PRESETS["a100-80gb"].product_efficiency
    for name in Hardware.__dataclass_fields__:
        assert name == "name" or f"`{name}`" in PAGE


def test_predictions_of_the_page_are_real() -> None:
    """The table of predicted rates is what the model predicts."""
    for row, recipe in zip(ROWS.values(), TABLE_1, strict=True):
        assert recipe.layout is not None
        assert recipe.gpus is not None
        workload = Workload(recipe.config, recipe.gpus, recipe.global_batch, 2048, recipe.numerics)
        rate = evaluate(workload, PRESETS["a100-80gb"], recipe.layout).flops_per_s / 1e12
        assert f"| {recipe.gpus} | {row.tflops} | {rate:.1f} | {100 * (rate / row.tflops - 1):+.1f} % |" in PAGE


def test_snippet_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of the page runs as it stands."""
    exec(compile(block("python", "Workload("), "planner.md", "exec"), {})

    assert capsys.readouterr().out.startswith("PlannedLayout(")
