"""The page about training data: its snippet and its commands run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon.cli import data
from trilithon.cli._parser import Parser

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_commands_and_snippet_run(
    write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, on small texts: smaller sizes stand in for its large ones."""
    monkeypatch.chdir(tmp_path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c for a in letters for b in "aeiou" for c in letters]
    write_rows("texts.jsonl", [" ".join(words[i::50]) for i in range(50)])
    (tmp_path / "book.txt").write_text(" ".join(words), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    parser = Parser(prog="trilithon data")
    data.add_arguments(parser)
    commands = re.findall(r"^trilithon data (.*)$", page, re.MULTILINE)

    assert len(commands) == 3
    for command in commands:
        assert data.run(parser.parse(shlex.split(command.replace("32000", "500")))) == 0, capsys.readouterr().err
    assert data.run(parser.parse(["prepare", "texts.jsonl", "--tokenizer", "tok", "--output", "corpus-2"])) == 0
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet.replace("2048", "16").replace("100_000", "100"), names)
    assert len(names["batch"].tokens) == 8 * 16  # type: ignore[attr-defined]
