"""Jobs that train an encoder of questions beside one of passages, and what is exported and deployed of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reader_facts as facts
import torch
from finetune_jobs import JobDir, make_job, twin, write_rows
from safetensors.torch import load_file

from trilithon.errors import InvalidArgument
from trilithon_finetune.setup import base_digest
from trilithon_server.engine.identity import model_digest
from trilithon_server.knowledge.passages import Passage
from trilithon_server.local_index import LocalEncoder
from trilithon_server.tasks import read_task
from trilithon_server.tasks.retrieval import RetrievalFormat


def pair_job(folder: Path, base: Path, **config: Any) -> JobDir:
    """A few steps of two encoders that begin as `base`."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": row["question"], "positive_ctxs": [{"title": "", "text": item["text"]}]}
        for row, item in zip(facts.questions(), facts.passages(), strict=True)
    ]
    training = {"epochs": 1, "batch_size": 8, **config.pop("training", {})}
    return make_job(
        folder,
        base,
        write_rows(folder / "train.jsonl", rows[:32]),
        write_rows(folder / "valid.jsonl", rows[32:40]),
        task="dpr",
        options={"shared": False, "hard_negatives": 0, **config.pop("options", {})},
        training=training,
        data={"max_tokens": 32},
        optimizer={"lr": 1e-3, "eps": 1e-4, "schedule": "constant"},
        checkpoint={"every_steps": 2},
        **config,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One encoder that has learned nothing."""
    return facts.write_model(tmp_path_factory.mktemp("base") / "encoder", facts.RETRIEVER, seed=2, sigma=0.2)


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """A job of one rank, from end to end."""
    return pair_job(tmp_path_factory.mktemp("pair"), base).walk()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in directory.glob("model*.safetensors") for name, x in load_file(path).items()}


def test_what_is_served_are_two_models(pair: JobDir, base: Path) -> None:
    """Each is a model directory by itself; that of questions says whose passages it asks for. Both have learned."""
    export = pair.root / "export"
    passages, questions = read_task(export), read_task(export / "query")
    began, *ended = (weights(path) for path in (base, export, export / "query"))

    assert isinstance(passages, RetrievalFormat)
    assert isinstance(questions, RetrievalFormat)
    assert (passages.reads, passages.passages_by) == ("passages", "")
    assert (questions.reads, questions.passages_by) == ("questions", model_digest(export))
    name = "encoder.layer.0.attention.self.query.weight"
    assert len({tuple(found[name].flatten()[:4].tolist()) for found in (began, *ended)}) == 3


def test_a_checkpoints_size_is_that_of_both(pair: JobDir) -> None:
    """As its folder has it, `query/` too. Inverse seen: what lies in folders left out."""
    saved = pair.events("checkpoint_saved")[-1]["data"]
    files = [path for path in (pair.run / saved["directory"]).rglob("*") if path.is_file()]

    assert "query" in {path.parent.name for path in files}
    assert saved["bytes"] == sum(path.stat().st_size for path in files)


def test_E4_each_export_says_what_the_trainer_said(pair: JobDir) -> None:
    """Questions by one, passages by the other, within 1e-4. Inverse: the next test."""
    data = pair.outcome("verify")["data"]

    assert [check["name"] for check in data["checks"]] == [
        "export and trainer, passages",
        "export and trainer, questions",
    ]
    assert data["max_abs"] < 1e-4


def test_verification_sees_encoders_that_were_swapped(pair: JobDir, tmp_path: Path) -> None:
    """The weights of one in the directory of the other end the job."""
    broken = twin(pair, tmp_path)
    export = broken.root / "export"
    shutil.copy(export / "model.safetensors", export / "query" / "model.safetensors")
    outcome = broken.try_phase("verify")

    assert outcome["error"]["code"] == "verify_mismatch"
    assert "questions" in outcome["error"]["message"]
    assert "passages:" not in outcome["error"]["message"]


def test_a_folder_searches_with_both(pair: JobDir) -> None:
    """In one process the encoder of questions is found beside that of passages; alone it makes no index."""
    export = pair.root / "export"
    text = "box1 lid2"
    with LocalEncoder(export, name="mine") as encoder:
        asked, told = encoder.queries([text]), encoder.passages([Passage(id="p", title="", text=text)])

    assert asked.shape == told.shape
    assert not np.allclose(asked, told, atol=1e-3)
    with pytest.raises(InvalidArgument, match="reads questions alone"):
        LocalEncoder(export / "query", name="asker")


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2}], ids=["tp2", "dp2"])
def test_E8_two_encoders_learn_the_same_at_every_layout(base: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    """Losses, validation numbers and all weights are those of one process (1e-5), dropout and all."""
    alone = pair_job(tmp_path / "alone", base, training={"dropout": 0.1})
    alone.phase("validate")
    alone.phase("prepare")
    other = twin(alone, tmp_path / "other")
    other.configure("parallel", **sizes)
    alone.train_here()
    other.train()
    numbers = [made.events("eval")[-1]["data"] for made in (alone, other)]
    saved = [made.checkpoints()[-1] for made in (alone, other)]

    assert alone.losses() == pytest.approx(other.losses(), rel=1e-5)
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    for path in (Path(), Path("query")):
        ours, theirs = (weights(directory / path) for directory in saved)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-5, msg=name)


def test_E9_two_encoders_go_on_bit_for_bit(pair: JobDir, tmp_path: Path) -> None:
    """From a checkpoint both have the losses, and end with the weights, of a run that nobody disturbed."""
    again = twin(pair, tmp_path)
    shutil.rmtree(again.run / "step_00000004")
    again.attempt = 2
    again.train_here()

    assert pair.losses() == again.losses()
    for path in (Path(), Path("query")):
        ours, theirs = (weights(made.run / "step_00000004" / path) for made in (pair, again))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_two_encoders_go_on_as_two(pair: JobDir, base: Path, tmp_path: Path) -> None:
    """A base of two is trained as two without being told so; each begins as itself."""
    again = pair_job(tmp_path, pair.root / "export", options={"shared": None}).walk()
    first, second = (made.root / "export" for made in (pair, again))

    digests = [made.outcome("validate")["data"]["base_digest"] for made in (pair, again)]

    assert digests == [model_digest(base), base_digest(first)]
    assert digests[1] != model_digest(first), "the encoder of questions is part of what it begins from"
    assert again.losses()[0] < pair.losses()[0]
    assert read_task(second / "query").passages_by == model_digest(second)  # type: ignore[union-attr]
    assert not torch.equal(*(weights(path)["embeddings.word_embeddings.weight"] for path in (second, second / "query")))
    assert model_digest(first) != model_digest(second)


def test_a_reader_is_trained_beside_two_encoders(pair: JobDir, tmp_path: Path) -> None:
    """Questions are sought by one and passages by the other; all three are exported, and verified."""
    made = facts.reader_job(
        tmp_path / "job",
        facts.new_reader(tmp_path / "reader"),
        retriever=pair.root / "export",
        train=facts.questions()[:16],
        valid=facts.questions()[16:22],
        options={"top_k": 3, "reload_every": 2},
        training={"epochs": 2, "batch_size": 8},
        optimizer={"lr": 2e-3, "schedule": "constant"},
        checkpoint={"every_steps": 4},
    ).walk()
    retriever = made.root / "export" / "retriever"
    before = pair.root / "export"

    assert made.outcome("verify")["data"]["max_abs"] < 1e-4
    assert read_task(retriever / "query").passages_by == model_digest(retriever)  # type: ignore[union-attr]
    for folder in (Path(), Path("query")):
        assert not torch.equal(
            *(weights(path / folder)["embeddings.word_embeddings.weight"] for path in (before, retriever))
        )


def test_R11_what_two_encoders_cannot_be_is_told(pair: JobDir, base: Path, tmp_path: Path) -> None:
    """No adapter, not one of two that are there, and no reader that looks passages up by questions."""
    export = pair.root / "export"
    adapted = pair_job(tmp_path / "a", base, tuning={"kind": "lora"}).try_phase("validate")["error"]
    joined = pair_job(tmp_path / "b", export, options={"shared": True}).try_phase("validate")["error"]
    reader = facts.reader_job(
        tmp_path / "c",
        facts.new_reader(tmp_path / "reader"),
        retriever=export / "query",
        train=facts.questions()[:4],
        valid=facts.questions()[4:6],
        options={"top_k": 3},
    ).try_phase("validate")["error"]

    assert adapted["code"] == "lora_not_servable"
    assert (joined["param"], reader["param"]) == ("options.shared", "options.retriever")
    assert "two encoders" in joined["message"]
    assert "reads questions alone" in reader["message"]


def test_older_task_files_are_of_one_encoder(pair: JobDir, tmp_path: Path) -> None:
    """A file from before there were two has no word about it."""
    document = json.loads((pair.root / "export" / "task.json").read_text("utf-8"))
    old = {key: value for key, value in document.items() if key not in ("reads", "passages_by")}
    (tmp_path / "task.json").write_text(json.dumps(old), encoding="utf-8")

    assert read_task(tmp_path).reads == "both"  # type: ignore[union-attr]
