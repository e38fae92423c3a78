"""Stories that a job labels itself: the labels of the command, kept for the next job, and sources that are none."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_jobs import JobDir, make_job, write_rows
from stories.story_jobs import HELD_OUT, SMALL, STORIES, a_job, with_many_facts

from trilithon.cli import main
from trilithon.cli._finetune_config import parsed
from trilithon.errors import InvalidArgument
from trilithon_finetune.config import JobConfig, parse_config
from trilithon_finetune.data.integer_file import map_integers
from trilithon_finetune.jobs.jobfile import write_job_file
from trilithon_finetune.jobs.outcome import AttemptFailed
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.labelling import FILE
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.setup import read_job
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.catalog import Catalog

LABELLED = {
    "sentences": ["A dog.", "The dog saw a boat."],
    "steps": [{"keywords": ["dog"], "facts": ["mine"], "ranked": ["mine"], "others": ["yours"]}],
}


@pytest.fixture
def many(concepts: Path, tmp_path: Path) -> Path:
    """More facts than fit a sentence."""
    return with_many_facts(concepts, tmp_path / "many")


@pytest.fixture
def command(many: Path, encoder: Path, tmp_path: Path) -> Any:
    """`trilithon data stories` on rows; the file that it writes."""

    def label(name: str, rows: list[dict[str, Any]]) -> Path:
        plain, made = write_rows(tmp_path / f"plain-{name}", rows), tmp_path / name
        flags = ["--concepts", str(many), "--encoder", str(encoder), "-o", str(made)]
        assert main(["data", "stories", str(plain), *flags]) == 0
        return made

    return label


def samples(made: JobDir) -> list[dict[str, Any]]:
    """Everything of a job's prepared data."""
    directory = read_job(made.root).prepared_dir
    return [map_integers(directory / f"{part}.safetensors") for part in ("train", "valid")]


@pytest.mark.parametrize("task", ["story_generator", "story_ranker"])
def test_a_job_labels_as_the_command_does(
    task: str, tmp_path: Path, decoder: Path, encoder: Path, many: Path, command: Any
) -> None:
    """
    What is learned and judged from plain rows is, integer by integer, what the same rows labelled by the command give.
    Validation without an encoder counts what there will be. Inverse seen: facts that are not ranked.
    """
    model = decoder if task == "story_generator" else encoder
    made = a_job(tmp_path / "plain", model, many, encoder, task)
    (tmp_path / "labelled").mkdir()
    rows = command("t.jsonl", STORIES), command("v.jsonl", HELD_OUT)
    other = make_job(tmp_path / "labelled", model, *rows, task=task, **SMALL)
    checked = made.phase("validate")
    for one in (made, other):
        one.phase("prepare")

    for ours, theirs in zip(samples(made), samples(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)
    facts = json.loads((read_job(made.root).prepared_dir / "index.json").read_text())
    assert checked["report"]["samples"] == facts["train"]["samples"] == len(samples(made)[0]["row"]) > 0
    told = made.events("prepare_progress")
    fractions = [event["data"]["fraction"] for event in told]
    assert fractions == sorted(fractions)
    assert ("labelled" in told[0]["message"], "tokenised" in told[-1]["message"]) == (True, True)


def test_labels_are_made_once(tmp_path: Path, decoder: Path, encoder: Path, concepts: Path) -> None:
    """
    They lie beside the prepared data under the digest of file, facts, encoder and options, and a job with other options
    of its own reads them there; other facts are labelled anew. What is broken is told. Inverse seen: a digest of the
    file alone.
    """
    first = a_job(tmp_path / "first", decoder, concepts, encoder, "story_generator")
    first.phase("prepare")
    store = read_job(first.root).store
    kept = sorted(store.root.glob(f"prepared/*/{FILE}"))
    for path in kept:
        path.write_text(path.read_text().replace("boat is at harbour", "boat is of mine"))
    second = a_job(tmp_path / "second", decoder, concepts, encoder, "story_generator", facts=2, predicted_share=0)
    second.change({"store": str(store.root)})
    second.phase("prepare")
    tokens = read_job(second.root)
    other = tmp_path / "other.tsv"
    other.write_text("IsA\tdog\tanimal\n")
    third = a_job(tmp_path / "third", decoder, other, encoder, "story_generator")
    third.change({"store": str(store.root)})
    third.phase("prepare")
    after = sorted(store.root.glob(f"prepared/*/{FILE}"))
    for path in kept:
        path.write_text("{")
    fourth = a_job(tmp_path / "fourth", decoder, concepts, encoder, "story_generator", facts=1)
    fourth.change({"store": str(store.root)})

    assert len(kept) == 2
    assert "boat is of mine" in texts(tokens.prepared_dir, decoder)
    assert len(after) == 4
    error = fourth.try_phase("prepare")["error"]
    assert (error["code"], "cannot be read" in error["message"]) == ("bug", True)


def texts(directory: Path, model: Path) -> str:
    """All training samples as one text."""
    tokens = map_integers(directory / "train.safetensors")["tokens"]
    return load_tokenizer(model).decode(tokens.tolist(), skip_special_tokens=False)


def test_rows_that_have_labels_keep_them(tmp_path: Path, decoder: Path, encoder: Path, concepts: Path) -> None:
    """Beside plain rows, which the job labels."""
    made = a_job(tmp_path / "job", decoder, concepts, encoder, "story_generator", predicted_share=0)
    write_rows(Path(made.spec["training_path"]), [LABELLED, STORIES[0]])
    made.phase("prepare")
    counts = [path.read_text().count("\n") for path in read_job(made.root).store.root.glob(f"prepared/*/{FILE}")]

    assert sorted(counts) == [1, 2]
    told = texts(read_job(made.root).prepared_dir, decoder)
    assert "Knowledge: mine" in told
    assert "Knowledge: boat" in told


def test_R11_a_source_that_is_none_is_told(tmp_path: Path, decoder: Path, encoder: Path, concepts: Path) -> None:
    """Which option, what must be there; in validation already, so nothing is queued."""
    made = a_job(tmp_path / "job", decoder, concepts, encoder, "story_generator")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.tsv").write_text("dog\n")
    found = []
    for change in (
        {"encoder_dir": str(decoder)},
        {"encoder_dir": str(tmp_path / "nothing")},
        {"concepts_path": str(tmp_path / "nothing")},
        {"concepts_path": str(tmp_path / "broken.tsv")},
    ):
        spec = made.spec
        made.change(change)
        found.append(made.try_phase("validate")["error"])
        made.change(spec)
    made.configure("options", encoder=None)
    alone = made.try_phase("validate")["error"]

    assert [error["code"] for error in found] == ["invalid_config"] * 4
    assert [error["param"] for error in found] == ["options.encoder"] * 2 + ["options.concepts"] * 2
    assert "must be an encoder. Given: writer" in found[0]["message"]
    assert "broken.tsv:1" in found[3]["message"]
    assert "concepts and encoder must be given together" in alone["message"]


def test_S8_a_request_names_no_paths(tmp_path: Path, decoder: Path, encoder: Path, concepts: Path) -> None:
    """
    The store takes names alone for concepts and encoder unless the command itself asks; a worker finds the server's
    concepts by their name, and tells which it knows. The command makes paths absolute.
    """
    paths = StorePaths(tmp_path / "store")
    jobs = Jobs(None, paths)
    file = jobs.put_file(io.BytesIO(b"{}\n"), tenant="local", filename="t.jsonl", purpose="fine-tune").id
    known = {"model": "writer", "task": "story_generator", "training_file": file}

    def config(concepts: str, encoder: str) -> JobConfig:
        return parse_config({**known, "options": {"concepts": concepts, "encoder": encoder}})

    for given in (config("/etc/passwd", "minilm"), config("village", "../minilm"), config(str(concepts), "minilm")):
        with pytest.raises(InvalidArgument, match=r"options\.(concepts|encoder) must be a name"):
            jobs.create(given, tenant="local")
    named = jobs.create(config("village", "minilm"), tenant="local")
    here = parsed({**known, "options": {"concepts": os.path.relpath(concepts), "encoder": os.path.relpath(encoder)}})
    local = jobs.create(here, tenant="local", local_paths=True)
    models = {"writer": decoder, "minilm": encoder}
    written = []
    for job in (named, local):
        paths.job(job.id).root.mkdir(parents=True)
        write_job_file(job, jobs=jobs, catalog=Catalog(paths.models), models=models, concepts={"village": concepts})
        written.append(read_job(paths.job(job.id).root))
    with pytest.raises(AttemptFailed) as unknown:
        write_job_file(named, jobs=jobs, catalog=Catalog(paths.models), models=models, concepts={})
    jobs.close()

    assert [(one.concepts_path, one.encoder_dir) for one in written] == [(concepts, encoder)] * 2
    assert unknown.value.error.param == "options.concepts"
