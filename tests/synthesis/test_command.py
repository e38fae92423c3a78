"""`trilithon synth-qa`: a corpus through a server or through models of this machine, interrupted, resumed, written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthesis.synthesizing import PASSAGES, Asked, asker_of_both, parts, serving_parts, triples

from trilithon.cli import main
from trilithon.cli._synth_qa_run import CorpusError, Document, read_corpus, squad
from trilithon_finetune.converters.squad import read_squad
from trilithon_finetune.recipes import RECIPES


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def served(models: tuple[Path, Path, Path]) -> Iterator[Asked]:
    with serving_parts(*models) as asked:
        yield asked


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f"{json.dumps(item)}\n" for item in PASSAGES), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> int:
    return main(["synth-qa", *map(str, arguments)])


def told(output: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(output)
    return document


def test_a_corpus_becomes_rows_of_a_reader(
    served: Asked, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file holds what the plain route keeps, a finetuning recipe finds it sound, and the summary adds up."""
    out = tmp_path / "made.json"
    code = run(corpus, "-o", out, "--url", served.server.url, "--seed", "7", "--format", "json")
    summary = told(capsys.readouterr().out)
    plain = triples(served.ask())
    rows = read_squad(out.read_bytes(), file="made.json")
    recipe = RECIPES["span_qa"]

    assert code == 0
    assert rows
    assert [(row["question"], row["answers"]) for row in rows] == [  # type: ignore[index]  # rows, not findings
        (item["question"], [{"text": item["answer"], "answer_start": item["answer_start"]}])
        for item in plain
        if item["kept"]
    ]
    for row in rows:
        assert recipe.check(row, recipe.formats[1], file="f", line=1) == []  # type: ignore[arg-type]  # rows
    assert summary["questions"] == len(plain)
    assert summary["kept"] == len(rows)
    assert sum(summary["dropped"].values()) == len(plain) - len(rows)
    assert set(summary["examples"]) == set(summary["dropped"])
    assert summary["models"]["proposed_by"] == "proposer"
    assert not (tmp_path / "made.json.part").exists()


def test_acc_E09_an_interrupted_run_goes_on(
    served: Asked, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    After any passage, and in the middle of a line, the same file comes out; other settings are refused, as are other
    models. Inverse seen red: the cut line read as it stands.
    """
    whole, again = tmp_path / "whole.json", tmp_path / "again.json"
    url = ("--url", served.server.url, "--batch", "2")
    assert run(corpus, "-o", whole, *url, "--format", "json") == 0
    lines, part = _lines_of(served, corpus, tmp_path), again.with_name("again.json.part")
    for done in range(1, 4):
        part.write_text("".join(f"{line}\n" for line in lines[: done + 1]) + lines[done + 1][:40], encoding="utf-8")
        assert run(corpus, "-o", again, *url) == 0
        assert json.loads(again.read_text("utf-8")) == json.loads(whole.read_text("utf-8"))
    part.write_text(f"{lines[0]}\n{lines[1]}\n", encoding="utf-8")
    assert run(corpus, "-o", again, *url, "--seed", "2") == 2
    assert "other settings" in capsys.readouterr().err
    part.write_text(lines[0].replace("proposer", "capitals_and_numbers") + "\n", encoding="utf-8")
    assert run(corpus, "-o", again, *url) == 2
    assert "other models" in capsys.readouterr().err
    assert run(corpus, "-o", again, *url, "--restart") == 0


def _lines_of(served: Asked, corpus: Path, folder: Path) -> list[str]:
    """What a run keeps, before it writes its file, which a folder is in the way of."""
    out = folder / "kept.json"
    (folder / ".kept.json.new").mkdir(exist_ok=True)
    with pytest.raises(IsADirectoryError):
        run(corpus, "-o", out, "--url", served.server.url, "--batch", "2")
    lines = (folder / "kept.json.part").read_text("utf-8").splitlines()
    (folder / "kept.json.part").unlink()
    return lines


def test_models_of_this_machine_do_it_too(
    served: Asked, models: tuple[Path, Path, Path], corpus: Path, tmp_path: Path
) -> None:
    """Offline: the same file as from a server of the same models, and nothing is left running."""
    near, far = tmp_path / "near.json", tmp_path / "far.json"
    local = [part for model in models for part in ("--local", f"{model.name}={model}")]
    assert run(corpus, "-o", far, "--url", served.server.url) == 0
    done = subprocess.run(
        [sys.executable, "-m", "trilithon.cli", "synth-qa", str(corpus), "-o", str(near), *local, "--dtype", "float32"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "questions about 5 passages were kept" in done.stdout
    assert json.loads(near.read_text("utf-8")) == json.loads(far.read_text("utf-8"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "corpus.jsonl:2 is not JSON"),
        ('{"id": "a"}', "corpus.jsonl:2 text: must be a text"),
        ('{"text": " "}', "corpus.jsonl:2 text: must be a text"),
        ('{"text": "a", "id": "mill"}', "corpus.jsonl:2 id: must be given once. Given: 'mill'"),
        ('{"text": "a", "title": ["b"]}', "corpus.jsonl:2 title: must be a text"),
        (r'{"text": "half \ud83d"}', "corpus.jsonl:2 text: must be sound Unicode"),
        (r'{"text": "a", "id": "\udc00"}', "corpus.jsonl:2 id: must be sound Unicode"),
        (r'{"text": "a", "title": "\ud83d\ud83d"}', "corpus.jsonl:2 title: must be sound Unicode"),
    ],
)
def test_R11_a_line_that_is_no_passage_is_told(tmp_path: Path, line: str, says: str) -> None:
    """File, line and field, before anything is asked; the command's exit code is 3."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"text": "x \\ud83d\\ude80", "id": "mill"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match=r"corpus\.jsonl:2") as error:
        read_corpus(path)

    assert says in str(error.value)
    assert run(path, "-o", tmp_path / "out.json") == 3


def test_questions_without_an_answer_make_a_second_version(tmp_path: Path) -> None:
    """
    From a model that learned both kinds comes SQuAD 2.0: every question says whether it has an answer, one that has
    none keeps what only looks like it; both a reader and an asker find the rows sound.
    """
    models = parts(tmp_path)
    asker, corpus, out = asker_of_both(models[0], tmp_path / "both"), tmp_path / "c.jsonl", tmp_path / "made.json"
    corpus.write_text("".join(f"{json.dumps(item)}\n" for item in PASSAGES[:2]), encoding="utf-8")
    with serving_parts(models[0], asker, *models[1:]) as asked:
        code = run(corpus, "-o", out, "--url", asked.server.url, "--model", "both", "--unanswerable", "2", "--filter",
                   "none", "--answers", "8")  # fmt: skip
    document = json.loads(out.read_text("utf-8")) if code == 0 else {}
    found = read_squad(out.read_bytes(), file="made.json")
    questions = [q for article in document["data"] for paragraph in article["paragraphs"] for q in paragraph["qas"]]

    assert document["version"] == "v2.0"
    assert {q["is_impossible"] for q in questions} == {True, False}
    for row, question in zip(found or (), questions, strict=True):
        assert row["is_impossible"] == question["is_impossible"] == (not row["answers"])  # type: ignore[index]
        assert bool(question.get("plausible_answers")) == question["is_impossible"]
        for task in ("span_qa", "question_gen"):
            assert RECIPES[task].check(row, RECIPES[task].formats[1], file="f", line=1) == []  # type: ignore[arg-type]


def test_neighbours_of_one_title_are_an_article() -> None:
    """Titles group, ids stand in for missing ones, and a passage that nothing was kept of is left out."""
    documents = [Document("1", "a b", "T"), Document("2", "c", "T"), Document("3", "d", ""), Document("4", "e", "T")]
    kept = {"question": "q?", "answer": "b", "answer_start": 2, "kept": True}
    made = squad(documents, {"1": [kept, {**kept, "kept": False}], "2": [kept], "3": [kept], "4": []})

    assert [(a["title"], [p["context"] for p in a["paragraphs"]]) for a in made["data"]] == [
        ("T", ["a b", "c"]), ("3", ["d"]),
    ]  # fmt: skip
    assert made["data"][0]["paragraphs"][0]["qas"] == [
        {"id": "1-0", "question": "q?", "answers": [{"text": "b", "answer_start": 2}]}
    ]
