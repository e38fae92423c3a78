"""What the verbs take: wrong input of every kind in a sentence, lists kept in the command too, a base install."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from scripted import Reply, http_server

from trilithon.cli import _finetune_arguments, _finetune_text
from trilithon.cli._finetune_logs import fresh
from trilithon_finetune.config import Task
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.series import OPENAI_COLUMNS

BASE_INSTALL = """
import importlib.util, sys
EXTRA = ("trilithon_finetune", "trilithon_server", "trilithon_parallel", "torch", "numpy", "sqlalchemy", "starlette")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import trilithon.cli._extra
trilithon.cli._extra.find_spec = lambda name: None if name in EXTRA else importlib.util.find_spec(name)
from trilithon.cli import main
sys.exit(main(sys.argv[1:]))
"""

ID = "ftjob-0k2j4h5g6f7d8s9a0q1w"
OTHER = "ftjob-0k2j4m8n7b6v5c4x3z2l"


def test_lists_that_the_command_keeps_are_the_packages() -> None:
    """Tasks, states and columns stand in the command too, which must not load the package for its help."""
    assert tuple(get_args(Task)) == _finetune_arguments.TASKS
    assert tuple(JobState) == _finetune_arguments.STATES
    assert OPENAI_COLUMNS == _finetune_text.OPENAI_COLUMNS


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "required: VERB"),
        (["vaildate"], 2, "Did you mean 'validate'?"),
        (["ls", "--sate", "queued"], 2, "unknown flag '--sate'. Did you mean '--state'?"),
        (["ls", "--state", "runing"], 2, "Did you mean 'running'?"),
        (["get", "ftjob-1"], 2, "must be a job's id, ftjob- and 20 letters and digits. Given: 'ftjob-1'"),
        (["export", f"{ID}@x", "-o", "a"], 2, "or ID@STEP. Given:"),
        (["export", ID], 2, "required: -o/--out"),
        (["compare", ID], 2, "must be two different jobs or more"),
        (["compare", ID, ID], 2, "must be two different jobs or more"),
        (["plot", ID, "-o", "loss.png"], 2, "must end in .svg, or be json. Given: 'loss.png'"),
        (["worker", "--slots", "0"], 2, "must be a whole number from 1. Given: '0'"),
        (["worker", "--backend", "slurm"], 2, "invalid choice: 'slurm'"),
        (["worker", "--database", "postgresql://me:secret@host/db"], 2, "must hold no password"),
        (["ls", "--store", "s", "--database", "postgresql://me:secret@host/db"], 2, "must hold no password"),
        (["ls", "--store", "s", "--url", "http://127.0.0.1:1"], 2, "Choose one."),
        (["ls", "--database", "postgresql://host/db"], 2, "--database goes with --store"),
        (["ls", "--url", "http://127.0.0.1:1"], 5, "Nothing answered at http://127.0.0.1:1"),
        (["get", ID, "--store", "s"], 2, f"there is no job '{ID}'"),
        (["run", ID, "--store", "s"], 2, f"there is no job '{ID}'"),
        (["run", ID, "--store", "s", "--set", "seed=1"], 2, "--set is for a new job"),
        (["validate", "none.jsonl", "--model", "m", "--task", "sft"], 2, "DATA must be a file. Given: none.jsonl"),
        (["validate", "a.jsonl", "--model", "m", "--task", "stf"], 2, "Did you mean 'sft'?"),
        (["validate", "a.jsonl", "--model", "smollm2", "--task", "sft"], 2, "Did you mean 'smollm2-135m-instruct'?"),
        (["validate", "a.jsonl", "--model", "./m", "--task", "sft"], 2, "'./m' does not exist"),
        (["validate", "a.jsonl", "--model", "m", "--task", "sft", "--set", "x"], 2, "--set takes NAME=VALUE"),
        (["validate", "a.jsonl", "--model", "m", "--task", "sft", "--set", "data.max_token=9"], 2, "`max_tokens`"),
        (["validate", "a.jsonl", "--model", "m", "--task", "sft", "--set", "seed={"], 2, "the value must be YAML"),
        (["validate", "a.jsonl", "--model", "all-minilm-l6-v2", "--task", "sft"], 2, "task sft needs a decoder"),
        (["preview", "a.jsonl", "--model", "smollm2-135m-instruct", "--task", "sft", "--row", "9"], 2, "up to 2"),
        (["preview", "a.jsonl", "--model", "smollm2-135m-instruct", "--task", "sft", "--row", "2"], 3, "E-DATA-003"),
        (["estimate", "none.yaml"], 2, "none.yaml does not exist"),
        (["estimate", "list.yaml"], 2, "must be a mapping"),
        (["estimate", "bad.yaml", "--store", "s"], 2, "bad.yaml training.epochs"),
        (["estimate", "gone.yaml", "--store", "s"], 2, "training_file must be a file, or the id of one"),
        (["create", "good.yaml", "--store", "s"], 2, "there is no terminal. Given: no -y"),
        (["create", "good.yaml", "--store", "s", "-y"], 3, "E-DATA-003"),
        (["run", "good.yaml", "--store", "s"], 3, "E-DATA-003"),
        (["verify", "none"], 2, "DIR must be an adapter directory or a model directory"),
        (["verify", "."], 3, "config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_R11_wrong_input_is_a_sentence(
    arguments: list[str], code: int, sentence: str, here: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong input gives a sentence on stderr, nothing on stdout, and the documented exit code."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    bad = "{broken\n" if code == 3 else ""
    (here / "a.jsonl").write_text(f"{good}\n{bad or good}\n")
    common = "model: smollm2-135m-instruct\ntraining_file: "
    (here / "good.yaml").write_text(f"{common}a.jsonl\n")
    (here / "bad.yaml").write_text(f"{common}a.jsonl\ntraining: {{epochs: 0}}\n")
    (here / "gone.yaml").write_text(f"{common}none.jsonl\n")
    (here / "list.yaml").write_text("[]\n")

    done = run(*arguments)

    assert (done.code, done.out) == (code, ""), done.err
    assert done.err.startswith("trilithon: ")
    assert sentence in done.err


def test_every_finding_of_a_configuration_is_told(here: Path, run: Callable[..., Any]) -> None:
    """Three mistakes are three lines."""
    (here / "job.yaml").write_text("model: m\ntask: stf\ntuning: {rank: 0, alfa: 1}\ntraining_file: a\n")

    done = run("estimate", "job.yaml")

    assert done.code == 2
    for name in ("task", "tuning.rank", "tuning.alfa"):
        assert f"job.yaml {name}" in done.err


def test_server_verbs_need_the_base_install_alone(tmp_path: Path) -> None:
    """
    Verbs that ask a server load none of the other packages; those that work here say which extra they need.

    Seen red with one of them imported at the top of the verb.
    """

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        full = [sys.executable, "-c", BASE_INSTALL, "finetune", *arguments]
        return subprocess.run(full, capture_output=True, text=True, cwd=tmp_path, check=False)

    with http_server() as server:
        server.answer = lambda asked: Reply(body={"object": "list", "data": [], "has_more": False})
        listed = command("ls", "--url", server.url)
        checkpoints = command("checkpoints", ID, "--url", server.url)
        metrics = command("metrics", ID, "--url", server.url)
    local = command("ls", "--store", "jobs")

    assert (listed.returncode, listed.stdout) == (0, "There are no jobs.\n"), listed.stderr
    assert checkpoints.returncode == 0, checkpoints.stderr
    assert metrics.returncode == 0, metrics.stderr
    assert local.returncode == 2
    assert "pip install 'trilithon[jobs]'" in local.stderr


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("", "a\n", "a\n"),
        ("a\n", "a\nb\n", "b\n"),
        ("a\nb\n", "b\nc\n", "c\n"),
        ("a\n", "x\ny\n", "x\ny\n"),
        ("a\n", "a\n", ""),
    ],
)
def test_a_followed_log_is_told_once(before: str, now: str, new: str) -> None:
    """What a window of a log says anew, also when its beginning has left the window."""
    assert new == fresh(before, now)
