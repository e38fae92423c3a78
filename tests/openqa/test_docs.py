"""docs/retrieval.md, run as it stands on tiny models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from open_questions import ALICE, Open

from trilithon.cli import main
from trilithon_server.config import ServeConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "retrieval.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_its_commands_run(
    served: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, on the passages that the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRILITHON_URL", served.server.url)
    monkeypatch.setenv("TRILITHON_API_KEY", ALICE)
    (tmp_path / "passages.jsonl").write_text(blocks("json")[0])
    commands = [line.removeprefix("$ trilithon ") for line in "".join(blocks("console")).splitlines()]
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err

    assert [command.split()[1] for command in commands] == ["build", "search", "refresh", "ls", "rm"]
    assert "The coast: The sea is two days" in capsys.readouterr().out


def test_its_request_is_answered(served: Open) -> None:
    """With the evidence that it asks for."""
    told = served.post("/v1/openqa", **json.loads(blocks("json")[1]))

    assert told["evidence"][0]["passage"]["id"] == "coast:0"


def test_its_program_runs(served: Open, capsys: pytest.CaptureFixture[str]) -> None:
    """On the server's own address, with a key."""
    (program,) = blocks("python")
    plain = '"http://127.0.0.1:8000"'
    assert plain in program
    exec(program.replace(plain, f"{served.server.url!r}, api_key={ALICE!r}"), {})  # the page's own program

    assert "The sea is two days away." in capsys.readouterr().out
    served.http.delete("/v1/retrieval/indexes/notes")


def test_its_configuration_is_one() -> None:
    """Every key is known."""
    config = ServeConfig.model_validate(yaml.safe_load(blocks("yaml")[0]))

    assert [engine.served_name for engine in config.engines] == ["writer", "encoder"]
