"""The verbs on the store of this machine: data looked at, jobs listed, told, compared, moved and served."""

from __future__ import annotations

import csv
import io
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_jobs import write_rows
from task_rows import rows

from trilithon_finetune.jobs.states import JobState
from trilithon_server.catalog import Catalog, CatalogEntry

Run = Callable[..., Any]
DECODER, ENCODER, LOCAL = "smollm2-135m-instruct", "all-minilm-l6-v2", "local"  # as the folder's fixtures have them


def test_validate_tells_every_finding_and_shows_examples(here: Path, run: Run) -> None:
    """A sound file shows its numbers and marked examples; a bad one its findings by line, and exit code 3."""
    good, bad = rows("sft", 3), rows("sft", 3)
    bad[1]["messages"][1]["role"] = "asistant"
    del bad[2]["messages"][1]["content"]

    sound = run("validate", write_rows(here / "good.jsonl", good), "--model", DECODER, "--task", "sft")
    broken = run("validate", write_rows(here / "bad.jsonl", bad), "--model", DECODER, "--task", "sft")
    first = run("validate", "bad.jsonl", "--model", DECODER, "--task", "sft", "--max-errors", "1")
    as_json = run("validate", "bad.jsonl", "--model", DECODER, "--task", "sft", "-o", "json")

    assert sound.code == 0
    assert "3 samples" in sound.out
    assert ">>It is red.<|im_end|><<" in sound.out
    assert broken.code == as_json.code == 3
    assert 'E-DATA-012  bad.jsonl:2  messages[1].role: "asistant" is not a role.' in broken.out
    assert "bad.jsonl:3" in broken.out
    assert "bad.jsonl:3" not in first.out
    assert [item["line"] for item in as_json.json["findings"]] == [2, 3]


def test_preview_shows_what_is_learned(here: Path, run: Run) -> None:
    """Text that is learned is marked; labels of tokens, classes and answers are told; JSON has every token."""
    write_rows(here / "chat.jsonl", rows("sft", 2))
    write_rows(here / "tags.jsonl", rows("ner", 2))
    write_rows(here / "class.jsonl", rows("classify", 4))
    write_rows(here / "span.jsonl", rows("span_qa", 2))

    chat = run("preview", "chat.jsonl", "--model", DECODER, "--task", "sft", "--row", "2")
    tokens = run("preview", "chat.jsonl", "--model", DECODER, "--task", "sft", "--row", "2", "-o", "json").json[0]
    tags = run("preview", "tags.jsonl", "--model", ENCODER, "--task", "ner")
    label = run("preview", "class.jsonl", "--model", ENCODER, "--task", "classify", "--row", "2")
    span = run("preview", "span.jsonl", "--model", ENCODER, "--task", "span_qa")

    assert "<|im_start|>assistant\n>>It is green.<|im_end|><<" in chat.out
    assert sum(token["learned"] for token in tokens["tokens"]) == tokens["num_learned"] > 0
    assert "B-Q" in tags.out
    assert "answer: odd" in label.out
    assert "answer: " in span.out
    assert {chat.code, tags.code, label.code, span.code} == {0}


def test_preview_colours_on_a_terminal(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal what is learned is green in place of being marked."""
    write_rows(here / "chat.jsonl", rows("sft", 1))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")

    shown = run("preview", "chat.jsonl", "--model", DECODER, "--task", "sft")

    assert "\x1b[1;32mIt is red." in shown.out
    assert ">>" not in shown.out


def test_estimate_prints_what_a_job_takes(job_yaml: Path, run: Run) -> None:
    """The table and its JSON say the same; a job that does not fit is exit code 2 and names what would help."""
    table = run("estimate", job_yaml, "--store", "s")
    numbers = run("estimate", job_yaml, "--store", "s", "-o", "json").json

    assert table.code == 0
    assert "steps    6 of 8 rows, 2 epochs" in table.out
    assert "fits     yes" in table.out
    assert numbers["estimate"]["steps"] == 6
    assert numbers["resolved"]["optimizer"]["lr"] == 2e-4
    assert f"{numbers['estimate']['supervised_tokens']:,} learned" in table.out.replace("of them ", "")


def test_estimate_measures_on_the_layout(job_yaml: Path, run: Run) -> None:
    """`--probe` starts the ranks, says what they took, leaves no job, and keeps the prepared data for the job."""
    table = run("estimate", job_yaml, "--probe", "--set", "parallel.tp=2", "--store", "s")
    numbers = run("estimate", job_yaml, "--probe", "--store", "s", "-o", "json").json["estimate"]

    assert table.code == 0
    assert "measured by steps of the job" in table.out
    assert numbers["measured"]
    assert numbers["memory_parts"]["measured"] > 100 << 20
    assert numbers["peak_bytes_per_rank"] == sum(numbers["memory_parts"].values())
    assert 0 < numbers["seconds_low"] < numbers["seconds"] < numbers["seconds_high"]
    assert len(list(Path("s/prepared").glob("[0-9a-f]*"))) == 1
    assert not Path("s/jobs").exists()
    assert run("ls", "--store", "s", "-o", "json").json == []


def test_R11_a_probe_says_why_it_ended(job_yaml: Path, run: Run, home: Path) -> None:
    """A base whose weights cannot be read ends the ranks; their own words are shown. A server is not probed."""
    broken = home.parent / "broken"
    shutil.copytree(home / "models" / DECODER, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-64])

    done = run("estimate", job_yaml, "--probe", "--set", f"model={broken}", "--store", "s")

    assert done.code == 2, done.err
    assert weights.name in done.err
    there = run("estimate", job_yaml, "--probe", "--url", "grpc://127.0.0.1:1")
    assert there.code == 2
    assert "--probe measures on this machine" in there.err


def test_create_queues_prints_and_leaves_nothing_behind(
    job_yaml: Path, made: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A dry run and a No leave neither job nor file; -y queues with ids in place of paths; the config round-trips.

    Seen red with uploads that stay.
    """
    dry = run("create", job_yaml, "--dry-run", *made.flags)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    refused = run("create", job_yaml, *made.flags)
    printed = run("create", job_yaml, "--print-config", "--set", "training.epochs=1", *made.flags)
    none = made.jobs.list(tenant=LOCAL).data, made.jobs.list_files(tenant=LOCAL).data
    (job_yaml.parent / "resolved.yaml").write_text(printed.out)
    created = run("create", "resolved.yaml", "-y", *made.flags, "-o", "json").json

    assert (dry.code, refused.code, printed.code) == (0, 0, 0)
    assert "Nothing was queued." in refused.err
    assert none == ((), ())
    resolved = yaml.safe_load(printed.out)
    assert (resolved["training"]["epochs"], resolved["optimizer"]["schedule"]) == (1, "cosine")
    assert Path(resolved["training_file"]).name == "chats.jsonl"
    job = made.jobs.get(created["id"], tenant=LOCAL)
    assert job.state is JobState.VALIDATING
    assert [file.filename for file in made.jobs.list_files(tenant=LOCAL).data] == ["dev.jsonl", "chats.jsonl"]


def test_jobs_are_listed_shown_and_asked(made: Any, run: Run) -> None:
    """ls, get, pause, resume and cancel say where jobs are; a final state is a sentence and exit code 2."""
    done, waiting = made.trained(suffix="faq"), made.job()
    made.worker.validated(waiting.id)

    table = run("ls", *made.flags)
    queued = run("ls", "--state", "queued", "-o", "json", *made.flags).json
    shown = run("get", done.id, *made.flags)
    document = run("get", done.id, "-o", "json", *made.flags).json
    paused = run("pause", waiting.id, *made.flags)
    resumed = run("resume", waiting.id, *made.flags)
    cancelled = run("cancel", waiting.id, *made.flags)
    late = run("resume", done.id, *made.flags)

    assert [line.split()[0] for line in table.out.splitlines()] == ["id", waiting.id, done.id]
    assert [job["id"] for job in queued] == [waiting.id]
    assert shown.out.splitlines()[0] == f"{done.id}  succeeded"
    assert f"result   {done.name}" in shown.out
    assert document["config"]["optimizer"]["lr"] == 1e-3
    assert [item.out.split()[1] for item in (paused, resumed, cancelled)] == ["paused", "queued", "cancelled"]
    assert late.code == 2
    assert "final" in late.err


def test_what_a_job_told_is_printed(made: Any, run: Run) -> None:
    """Events are a line each or JSON lines, logs are made safe, checkpoints show their numbers."""
    job = made.trained()

    events = run("events", job.id, *made.flags)
    lines = [json.loads(line) for line in run("events", job.id, "-f", "-o", "json", *made.flags).out.splitlines()]
    later = run("events", job.id, "--after", str(len(lines) - 1), *made.flags)
    logs = run("logs", job.id, "-f", *made.flags)
    missing = run("logs", job.id, "--rank", "3", *made.flags)
    checkpoints = run("checkpoints", job.id, *made.flags)

    assert [event["seq"] for event in lines] == list(range(1, len(lines) + 1))
    assert len(events.out.splitlines()) == len(lines)
    assert "succeeded: The job has succeeded." in later.out
    assert logs.out == "hello\n\\x1b[2Jworld\n"
    assert missing.code == 2
    assert "has printed nothing" in missing.err
    assert "0.2500" in checkpoints.out


def test_metrics_and_plot(made: Any, run: Run) -> None:
    """CSV has OpenAI's columns first and every row; the picture is SVG with the curves under their public names."""
    job = made.trained()

    table = run("metrics", job.id, *made.flags)
    text = run("metrics", job.id, "--csv", *made.flags).out
    drawn = run("plot", job.id, "-o", "loss.svg", *made.flags)
    numbers = run("plot", job.id, "-o", "json", *made.flags).json
    unwritable = run("plot", job.id, "-o", "none/loss.svg", *made.flags)

    read = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0].startswith("step,train_loss,train_mean_token_accuracy,valid_loss,")
    seen = [(row["step"], row["train_loss"], row["valid_loss"]) for row in read]
    assert seen[:2] == [("1", "1.0", ""), ("2", "0.5", "0.25")]
    assert "valid_loss" in table.out
    assert drawn.out == "loss.svg\n"
    words = [node.text for node in ElementTree.parse("loss.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert "loss, training" in words
    assert "loss, validation" in words
    assert numbers["checkpoints"] == [2]
    assert unwritable.code == 2


def test_compare_shows_what_differs_and_what_came_of_it(made: Any, run: Run) -> None:
    """Only settings that differ are in the table; the best of each evaluation and the last loss stand below."""
    first, second = made.trained(lr=1e-3), made.trained(lr=4e-3)

    table = run("compare", first.id, second.id, *made.flags)
    document = run("compare", first.id, second.id, "-o", "json", *made.flags).json
    drawn = run("compare", first.id, second.id, "-o", "both.svg", *made.flags)

    cells = {line.split("  ")[0]: line.split() for line in table.out.splitlines()}
    assert cells["optimizer.lr"][-2:] == ["0.001", "0.004"]
    assert "optimizer.schedule" not in cells
    assert cells["train_loss"][-2:] == ["0.2500", "1.0000"]
    assert cells["f1, best"][-2:] == ["0.4000", "0.4000"]
    assert set(document["differences"]) == {"optimizer.lr", "training_file"}
    assert document["jobs"][0]["tokens_per_second"] == 200.0
    assert drawn.code == 0
    words = [node.text for node in ElementTree.parse("both.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert f"loss, {first.id[-6:]}" in words
    assert f"validation loss, {second.id[-6:]}" in words


def test_results_are_written_and_served(made: Any, run: Run, here: Path) -> None:
    """export writes what the job made, without the optimizer; deploy moves a name; what is not there is a sentence."""
    job, waiting = made.trained(), made.job()
    folder = made.jobs.paths.job(job.id)
    for directory in (folder.export, folder.run / "step_00000002"):
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
        (directory / "optim-00001-of-00001.safetensors").write_text("o")
    entry = CatalogEntry(
        name=job.name, kind="adapter", base=DECODER, base_digest="b", path=folder.export, digest="d", tenant=LOCAL
    )
    Catalog(made.jobs.paths.models).register(entry)

    exported = run("export", job.id, "-o", "adapter", *made.flags)
    step = run("export", f"{job.id}@2", "--format", "peft", "-o", "adapter-2", "--json", *made.flags).json
    again = run("export", job.id, "-o", "adapter", *made.flags)
    none = run("export", f"{job.id}@3", "-o", "adapter-3", *made.flags)
    early = run("export", waiting.id, "-o", "adapter-4", *made.flags)
    deployed = run("deploy", job.id, "--as", "faq", *made.flags)
    wrong = run("deploy", job.id, "--as", "No Name", *made.flags)
    not_served = run("deploy", f"{job.id}@2", "--as", "faq", *made.flags)
    elsewhere = run("undeploy", "faq", "--expected", "tiny", *made.flags)
    undeployed = run("undeploy", "faq", "--expected", job.name, *made.flags)
    gone = run("undeploy", "faq", "-o", "json", *made.flags)

    assert exported.code == 0
    assert [path.name for path in (here / "adapter").iterdir()] == ["adapter_config.json"]
    assert (step["format"], (here / "adapter-2" / "adapter_config.json").read_text()) == ("peft", "{}")
    assert (again.code, none.code, early.code) == (2, 2, 2)
    assert "Steps: 2" in none.err
    assert not list(here.glob("*adapter-3*")) + list(here.glob("*adapter-4*"))
    assert deployed.out == f"faq -> {job.name}\n"
    assert wrong.code == 2
    assert "is not served" in not_served.err
    assert (elsewhere.code, "Expected: to point to 'tiny'" in elsewhere.err) == (2, True)
    assert undeployed.out == f"faq is gone; {job.name} stays.\n"
    assert (gone.code, Catalog(made.jobs.paths.models).alias("faq", tenant=LOCAL)) == (2, None)


def test_clean_tells_and_takes_away(made: Any, run: Run) -> None:
    """`--dry-run` lists what would go with its size; without it that is gone, and a second time there is nothing."""
    job = made.trained()
    folder = made.jobs.paths.job(job.id)
    for step in (2, 4):
        (folder.run / f"step_0000000{step}").mkdir()
        (folder.run / f"step_0000000{step}" / "weights").write_bytes(b"w" * 2048)
        (folder.run / f"step_0000000{step}" / "manifest.json").write_text('{"state": {}}')
    (folder.run / "latest").write_text("step_00000004\n")
    kept = run("clean", "--dry-run", *made.flags)
    made.jobs.paths.policy.write_text("checkpoint_days: 0\n")

    dry = run("clean", "--dry-run", *made.flags)
    before = (folder.run / "step_00000002").is_dir()
    done = run("clean", "-o", "json", *made.flags)
    again = run("clean", *made.flags)
    made.jobs.paths.policy.write_text("checkpoint_day: 0\n")
    wrong = run("clean", *made.flags)

    assert kept.out == again.out.replace("went", "would go")
    assert "step_00000002" in dry.out
    assert dry.out.splitlines()[-1].startswith("1 thing would go, 2.0 KiB")
    assert before
    assert [(item["kind"], item["bytes"]) for item in done.json] == [("checkpoint", 2048 + 13)]
    assert not (folder.run / "step_00000002").exists()
    assert (folder.run / "step_00000004").is_dir()
    assert wrong.code == 2
    assert "policy.yaml" in wrong.err


@pytest.mark.parametrize(
    ("name", "document", "task", "train", "dev"),
    [
        ("conll", "the\tO\nred\tB-Q\n\na\tO\n", "ner", 2, 0),
        (
            "squad",
            json.dumps({"data": [{"title": title, "paragraphs": [{"context": "a b", "qas": [
                {"id": title, "question": "b?", "answers": [{"text": "b", "answer_start": 2}]}]}]}
                for title in ("one", "two")]}),
            "span_qa", 1, 1,
        ),
    ],
    ids=["conll", "squad"],
)  # fmt: skip
def test_published_sets_become_rows(
    name: str, document: str, task: str, train: int, dev: int, here: Path, run: Run
) -> None:
    """`data convert` writes rows that `finetune validate` takes; a file of another form is exit code 3."""
    (here / "in").write_text(document)

    done = run("convert", name, "in", "-o", "out", "--format", "json", verb="data")
    checked = run("validate", "out/train.jsonl", "--model", ENCODER, "--task", task)
    wrong = run("convert", "pubtator" if name == "squad" else "squad", "in", "-o", "out2", verb="data")
    listed = run("convert", "--list", verb="data")
    unknown = run("convert", name[:-1], "in", "-o", "out", verb="data")

    assert done.json["rows"] == {"train": train, **({"dev": dev} if dev else {})}
    assert len((here / "out" / "train.jsonl").read_text().splitlines()) == train
    assert "E-DATA-00" not in checked.out
    assert wrong.code == 3
    assert name in listed.out
    assert unknown.code == 2
    assert f"Did you mean {name!r}?" in unknown.err
