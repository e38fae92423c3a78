"""Questions without an answer: from rows to the threshold that a server says "no answer" by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from finetune_jobs import JobDir, make_job, write_rows
from served import serving
from task_rows import rows

from trilithon_finetune.metrics.squad import best_of, token_f1

NUM_VALID = 12


def asked(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Questions of which every third has no answer."""
    found = rows("span_qa", count, first=first)
    for row in found[::3]:
        row |= {"answers": [], "is_impossible": True, "question": f"who sold {row['question'][8:]}"}
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoder_dir: Path) -> JobDir:
    """A job with such rows, verified."""
    folder = tmp_path_factory.mktemp("no-answer")
    made = make_job(
        folder,
        encoder_dir,
        write_rows(folder / "train.jsonl", asked(24)),
        write_rows(folder / "valid.jsonl", asked(NUM_VALID, first=1000)),
        task="span_qa",
        options={"no_answer": True},
        training={"epochs": 6, "batch_size": 8},
        optimizer={"lr": 5e-3},
        eval={"every_steps": 3},
    )
    return made.walk()


def chosen(made: JobDir) -> dict[str, float]:
    """The evaluation of the checkpoint that was exported."""
    step = made.outcome("export")["data"]["step"]
    (numbers,) = [event["data"] for event in made.events("eval") if event["data"]["step"] == step]
    return dict(numbers)


def test_an_export_has_the_threshold_of_its_own_checkpoint(finished: JobDir) -> None:
    """
    The task file has what did best in the evaluation of the chosen step, whatever other steps say.

    Inverse check: with the last step's evaluation in its place.
    """
    told = json.loads((finished.root / "export" / "task.json").read_text("utf-8"))
    others = {event["data"]["best_threshold"] for event in finished.events("eval")}

    assert told["null_threshold"] == chosen(finished)["best_threshold"]
    assert len(others) == 6
    assert (
        chosen(finished)["f1"] == chosen(finished)["best_f1"] == max(e["data"]["f1"] for e in finished.events("eval"))
    )


def test_a_server_says_no_answer_by_it(finished: JobDir) -> None:
    """The export as it stands answers the validation with the F1 that the job told; a request's own value wins."""
    questions = asked(NUM_VALID, first=1000)
    with serving(finished.root / "export", "--dtype", "float32") as server, httpx.Client(base_url=server.url) as http:

        def ask(row: dict[str, Any], **values: float) -> dict[str, Any]:
            body = {"question": row["question"], "contexts": [row["context"]], **values}
            answer: dict[str, Any] = http.post("/v1/extract/spans", json=body, timeout=60).json()
            return answer

        answers = [ask(row) for row in questions]
        never, always = (
            [ask(row, null_threshold=value)["no_answer"] for row in questions] for value in (1e9, -1e9)
        )  # fmt: skip

    said = ["" if answer["no_answer"] else answer["answers"][0]["text"] for answer in answers]
    scores = [
        best_of(token_f1, text, [gold["text"] for gold in row["answers"]])
        for text, row in zip(said, questions, strict=True)
    ]
    # The threshold is one question's own margin: that one may fall on either side of it.
    assert sum(scores) / NUM_VALID == pytest.approx(chosen(finished)["best_f1"], abs=1.01 / NUM_VALID)
    assert 0 < said.count("") < NUM_VALID
    assert not any(never)
    assert all(always)
