"""docs/finetuning.md, run as it stands: tiny models stand in for those that it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from served import Server
from tiny import tiny_llama

from trilithon.cli._main import VERBS
from trilithon.cli._parser import Parser
from trilithon_finetune.data.findings import line_form
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.recipes import RECIPES

Run = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "finetuning.md").read_text()
EXAMPLES = ROOT / "examples" / "finetune"
ROWS = (
    "sft", "sft", "lm", "dpo", "answer_qa", "yes_no_maybe", "ner", "relation", "classify", "span_qa",
    "dialogue", "dpr", "ict", "reader_joint", "story_generator",
)  # fmt: skip
"""Task of each example row of the page."""
ALSO = {
    "mlm": "lm",
    "answer_gen": "span_qa",
    "question_gen": "span_qa",
    "grounded_dialogue": "dialogue",
    "mss": "ict",
    "reader_individual": "reader_joint",
    "story_keywords": "story_generator",
}
"""Tasks that take the rows of others; those of `story_ranker` are made by a command."""


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def _commands() -> list[str]:
    """Every command of the page, its continuation lines joined."""
    text = "".join(_blocks("console")).replace("\\\n", "")
    return [line.removeprefix("$ ") for line in text.splitlines()]


def _parse(verb: str, arguments: list[str]) -> None:
    import importlib

    parser = Parser(prog=f"trilithon {verb}")
    importlib.import_module(f"trilithon.cli.{verb}").add_arguments(parser)
    parser.parse(arguments)


@pytest.fixture
def walk(here: Path, home: Path) -> Path:
    """The example folder: one epoch of each job, and longer rows, since the tiny model's tokens are bytes."""
    folder = shutil.copytree(EXAMPLES, here / "finetune")
    for name in ("job.yaml", "notes.yaml"):
        text = re.sub(r"epochs: \d+", "epochs: 1", (folder / name).read_text())
        (folder / name).write_text(text.replace("max_tokens: 256", "max_tokens: 512"))
    shutil.rmtree(home / "finetune", ignore_errors=True)
    return folder


@pytest.mark.timeout(900)  # two jobs, each of five processes that load torch
def test_the_walk(walk: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Every command of the page that works on this machine runs in its order, from data to verified results.

    The inverse: `verify` answers 7 where the base is another one, and 3 for an adapter that lacks a tensor.
    """
    monkeypatch.chdir(walk)
    (walk / "tty.py").write_text("raise SystemExit")  # a module's name: nothing of the folder may be imported
    job_id, ran = "", []
    for command in _commands():
        program, *arguments = shlex.split(command.replace("$JOB", job_id or "ftjob-" + "0" * 20))
        if program != "trilithon":
            assert program in ("cd", "curl")
            continue
        verb, *arguments = arguments
        assert verb in VERBS
        here_alone = verb == "data" or (verb == "finetune" and not _asks_a_server(arguments))
        if not here_alone:
            _parse(verb, arguments)
            continue
        done = run(*arguments, verb=verb)
        assert done.code == 0, (command, done.err)
        ran.append(arguments[0])
        if arguments[:2] == ["run", "job.yaml"]:
            job_id = done.err.splitlines()[0]
            assert "ft:smollm2-135m-instruct:library:" in done.out

    expected = {"validate", "preview", "estimate", "run", "ls", "get", "metrics", "plot", "deploy", "export", "verify"}
    assert expected <= {*ran}
    assert ran.count("run") == 2
    rows = run("metrics", job_id, "-o", "json", "--store").json
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"train_loss", "lr", "tokens_per_second"} <= set(rows[0])
    assert "valid_loss" in rows[3]
    other = run("verify", "adapter", "--base", tiny_llama(walk / "other", scale=0.1, seed=1))
    assert other.code == 7
    assert "made on this base" in other.out
    unmerged = run("export", job_id, "--format", "model", "--base", "./other", "-o", "merged-2", "--store")
    assert unmerged.code == 2
    assert "must be the model that" in unmerged.err
    state = load_file("adapter/adapter_model.safetensors")
    save_file({name: state[name] for name in sorted(state)[1:]}, "adapter/adapter_model.safetensors")
    missing = run("verify", "adapter", "--base", "smollm2-135m-instruct")
    assert missing.code == 3
    assert "lora_A" in missing.err


def _asks_a_server(arguments: list[str]) -> bool:
    local = ("validate", "preview", "estimate", "run", "verify")
    return "--store" not in arguments and arguments[0] not in local


def test_what_asks_a_server(server: tuple[Server, Jobs], walk: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and snippet of the page that asks a server runs against one."""
    running, jobs = server
    monkeypatch.chdir(walk)
    monkeypatch.setenv("TRILITHON_URL", running.url)
    job_id = ""
    for command in _commands():
        program, *arguments = shlex.split(command.replace("$JOB", job_id))
        if program == "trilithon" and arguments[0] == "finetune" and _asks_a_server(arguments[1:]):
            asked = [word for word in arguments[1:] if word != "-f"]  # nothing works on the job, so it has no end
            done = run(*asked)
            assert done.code == 0, (command, done.err)
            job_id = done.out.split()[0] if "-y" in arguments else job_id
    assert jobs.get(job_id, tenant="local").state.value == "cancelled"

    upload, create = (command for command in _commands() if command.startswith("curl"))
    file = json.loads(_shell(upload, running))
    made = json.loads(_shell(create.replace("FILE", file["id"]), running))
    assert made["trilithon"]["config"]["tuning"]["rank"] == 8

    for block in _blocks("python"):
        before = len(jobs.list(tenant="local", limit=100).data)
        exec(compile(block.replace("http://127.0.0.1:8000", running.url), "docs/finetuning.md", "exec"), {})
        assert len(jobs.list(tenant="local", limit=100).data) == before + 1


def _shell(command: str, server: Server) -> str:
    words = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_rows_of_the_page_are_sound() -> None:
    """Each example row is one that its task takes without a finding; every task has one."""
    (block,) = _blocks("json")
    rows = [json.loads(line) for line in block.splitlines()]

    known = dict(zip(ROWS, rows, strict=True))
    for task, row in [*zip(ROWS, rows, strict=True), *((task, known[other]) for task, other in ALSO.items())]:
        recipe = RECIPES[task]
        form = recipe.detect(row)
        assert form in recipe.formats
        assert recipe.check(row, form, file="x", line=1) == []
    assert {*ROWS, *ALSO, "story_ranker"} == set(RECIPES)


def test_the_example_of_a_finding_is_real() -> None:
    """The first line of the page's report is what the check says of such a row."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    row["messages"].append({"role": "asistant", "content": "c"})

    found = RECIPES["sft"].check(row, "messages", file="train.jsonl", line=17)

    assert line_form(found[0]) in PAGE


def test_the_page_shows_the_examples_configuration() -> None:
    """The YAML of the page is the file of the examples, but for its comment."""
    (block,) = _blocks("yaml")

    assert block == (EXAMPLES / "job.yaml").read_text().partition("\n")[2]


@pytest.mark.parametrize("name", ["library.jsonl", "library-dev.jsonl", "notes.jsonl", "notes-dev.jsonl"])
def test_example_data_is_sound(name: str, walk: Path, run: Run) -> None:
    """No finding, not even a warning, in the data of the examples."""
    model, task = ("smollm2-135m-instruct", "sft") if name.startswith("library") else ("all-minilm-l6-v2", "ner")

    done = run("validate", walk / name, "--model", model, "--task", task, "-o", "json")

    assert (done.code, done.json["findings"]) == (0, [])
