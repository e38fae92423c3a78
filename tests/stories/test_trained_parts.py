"""What jobs made of stories' parts is what a server tells stories with, to the number that the job was judged by."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from finetune_jobs import JobDir
from safetensors.torch import load_file
from served import Server, serving
from stories.story_jobs import HELD_OUT, a_job, with_many_facts

from trilithon import Client
from trilithon_finetune.metrics.texts import num_words
from trilithon_finetune.recipes.base import IGNORE, Output, Sample
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.evaluation import contrast_loss
from trilithon_finetune.train.work import Work, open_work
from trilithon_parallel.contrast_terms import QUERY, Contrast
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.engine.identity import model_digest
from trilithon_server.knowledge.concepts import read_concepts
from trilithon_server.story_telling import first_end, seed_of
from trilithon_server.tasks import read_task
from trilithon_server.tasks.story_format import RankerFormat, SentenceFormat

TOLERANCE = 1e-5
"""Of fp32 across the trainer's packed batches and the server's."""
FIRST = "The old miller had a dog."


@pytest.fixture(scope="module")
def facts(concepts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's and the jobs' concepts."""
    return with_many_facts(concepts, tmp_path_factory.mktemp("facts") / "village")


@pytest.fixture(scope="module")
def ranker(encoder: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """A ranker that learned by a margin: an encoder of stories, and that of facts as it was."""
    folder = tmp_path_factory.mktemp("ranker") / "job"
    return a_job(folder, encoder, facts, encoder, "story_ranker", lr=1e-2, loss="max_margin", positives=2).walk()


@pytest.fixture(scope="module")
def teller(decoder: Path, encoder: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """An adapter that learned to go on with stories; it has seen facts that a server would choose, and keywords."""
    return a_job(tmp_path_factory.mktemp("teller") / "job", decoder, facts, encoder, "story_generator", lr=1e-2).walk()


@pytest.fixture(scope="module")
def trained(ranker: JobDir, teller: JobDir, decoder: Path, flags: list[str], facts: Path) -> Iterator[Server]:
    """The decoder with the adapter, a plain encoder, the two of the ranker, and the concepts."""
    export = ranker.root / "export"
    told = [*engine(2, "knower", export), *engine(3, "ranker", export / "query"), "--set", f"server.concepts={facts}"]
    adapter = ["--adapter", f"teller={teller.root / 'export'}"]
    with serving(decoder, *flags, "--set", "engines.1.dtype=float32", *told, *adapter) as server:
        yield server


def engine(index: int, name: str, model: Path) -> list[str]:
    """What a server is told of one engine more."""
    pairs = {"name": name, "served_name": name, "model": model, "num_threads": 1, "dtype": "float32"}
    pairs |= {"memory_fraction": 0.1}
    return [part for key, value in pairs.items() for part in ("--set", f"engines.{index}.{key}={value}")]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def vectors(server: Server, model: str, sequences: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    with Client(server.url) as client:
        found = client.embed([list(one) for one in sequences], model=model)
    return np.array([row.values for row in found.data], np.float32)


def valid_of(made: JobDir) -> tuple[Work, list[Sample]]:
    """A job's held-out samples."""
    work = open_work(read_job(made.root))
    return work, [work.prepared.valid.sample(i) for i in range(len(work.prepared.valid))]


def judged(made: JobDir) -> dict[str, float]:
    """The numbers of a job's one validation."""
    lines = map(json.loads, (made.run / "metrics.jsonl").read_text("utf-8").splitlines())
    (judged,) = [line for line in lines if "validation_loss" in line]
    return {"valid_loss": judged["validation_loss"], **judged["validation"]}


def test_E4_a_served_ranker_is_the_one_that_was_judged(trained: Server, ranker: JobDir) -> None:
    """
    From vectors of the server come the job's own validation loss, by its margin, and its order of the facts. Inverse
    seen: vectors of the encoder that it began from.
    """
    work, samples = valid_of(ranker)
    numbers = judged(ranker)
    asked = [sample for sample in samples if sample.columns["role"] == QUERY]
    others = [sample for sample in samples if sample.columns["role"] != QUERY]
    told = {
        id(sample): values
        for model, some in (("ranker", asked), ("knower", others))
        for sample, values in zip(some, vectors(trained, model, [one.tokens for one in some]), strict=True)
    }
    outputs = [Output(sample, told[id(sample)]) for sample in samples]
    size = work.prepared.valid.unit * 4
    loss = contrast_loss(outputs, work.contrast, batch_samples=size)

    assert work.contrast == Contrast(1.0, 0.5, within=True)
    assert loss == pytest.approx(numbers["valid_loss"], abs=TOLERANCE)
    measured = work.recipe.metrics(outputs, {}, work.context)
    assert set(measured) == {"r_precision"}
    for name, value in measured.items():
        assert value == pytest.approx(numbers[name], abs=TOLERANCE), name


def test_stories_take_the_trained_ranker(trained: Server, ranker: JobDir, facts: Path) -> None:
    """
    Before a plain encoder, unasked, in the format of its task file, by either name of the two: facts come in the order
    of its cosines, which is not that of the encoder that it began from.
    """
    body = {"model": "writer", "first_sentence": FIRST, "seed": 3, "sentences": 1, "max_tokens": 8, "knowledge_k": 6,
            "controls": [{"index": 2, "keywords": ["boat", "dog"]}]}  # fmt: skip
    told, named, plain = (
        httpx.post(f"{trained.url}/v1/stories", json={**body, **more}, timeout=60).json()["sentences"][1]["facts"]
        for more in ({}, {"ranker": "ranker"}, {"ranker": "encoder"})
    )
    format_ = read_task(ranker.root / "export")
    assert isinstance(format_, RankerFormat)
    tokenizer = load_tokenizer(ranker.root / "export")
    known = [fact.text for fact in read_concepts(facts).graph.facts(["boat", "dog"]).facts]
    story = vectors(trained, "ranker", [format_.story([FIRST], tokenizer, keywords=["boat", "dog"]).tokens])[0]
    rows = vectors(trained, "knower", [format_.fact(text, tokenizer).tokens for text in known])
    cosines = dict(zip(known, (rows @ story).tolist(), strict=True))

    assert told == named
    assert format_.max_story == 96
    assert [fact["score"] for fact in told] == pytest.approx([cosines[fact["text"]] for fact in told], abs=1e-4)
    assert [fact["score"] for fact in told] == pytest.approx(sorted(cosines.values(), reverse=True)[:6], abs=1e-4)
    assert [fact["text"] for fact in told] != [fact["text"] for fact in plain]


def test_the_encoder_of_facts_stays_unless_it_is_to_learn(
    ranker: JobDir, encoder: Path, facts: Path, tmp_path: Path
) -> None:
    """
    To the bit the base, and of one digest with that of another ranker, so that vectors of facts are made once for all.
    With `train_facts` both learn, and with `shared` there is one encoder.
    """
    both, one = (
        a_job(tmp_path / name, encoder, facts, encoder, "story_ranker", lr=1e-2, **{name: True}).walk()
        for name in ("train_facts", "shared")
    )
    other = a_job(tmp_path / "other", encoder, facts, encoder, "story_ranker", lr=1e-3).walk().root / "export"
    began = tensors(encoder)
    word = "embeddings.word_embeddings.weight"
    export = ranker.root / "export"

    assert all(torch.equal(tensor, began[name]) for name, tensor in tensors(export).items())
    assert model_digest(other) == model_digest(export)
    assert model_digest(other / "query") != model_digest(export / "query")
    assert not torch.equal(tensors(export / "query")[word], began[word])
    assert not torch.equal(tensors(both.root / "export")[word], began[word])
    assert not (one.root / "export" / "query").exists()
    assert not torch.equal(tensors(one.root / "export")[word], began[word])


def test_R11_one_of_two_alone_ranks_nothing(ranker: JobDir, decoder: Path, flags: list[str]) -> None:
    """The encoder of stories without that of facts is refused with what to serve."""
    told = engine(2, "ranker", ranker.root / "export" / "query")
    body = {"model": "writer", "first_sentence": FIRST, "ranker": "ranker", "sentences": 1, "max_tokens": 4}
    with serving(decoder, *flags, *told) as server:
        refused = httpx.post(f"{server.url}/v1/stories", json=body, timeout=60)
        plain = httpx.post(f"{server.url}/v1/stories", json={**body, "ranker": "encoder"}, timeout=60)

    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "unsupported_model")
    assert "reads stories alone, and the one of facts is not served" in error["message"]
    assert plain.status_code == 200


def test_E4_a_served_adapter_loses_what_the_job_was_told(trained: Server, teller: JobDir) -> None:
    """
    The server's log-probabilities of the held-out sentences make the job's validation loss and word perplexity. Inverse
    seen: the base model without the adapter.
    """
    _, samples = valid_of(teller)
    numbers = judged(teller)
    items: list[Any] = []
    for sample in samples:
        learned = [target != IGNORE for target in sample.targets]
        first = learned.index(True) + 1
        assert all(learned[first - 1 : -1])
        items.append({"context": list(sample.tokens[:first]), "continuation_tokens": [list(sample.tokens[first:])]})
    with Client(trained.url) as client:
        scores = client.score(items, model="teller").items
    said = math.fsum(score.sum_logprob[0] for score in scores)
    words = num_words([HELD_OUT[sample.row - 1]["sentences"][sample.part] for sample in samples])

    assert len(samples) == 2
    assert -said / sum(sample.num_supervised for sample in samples) == pytest.approx(
        numbers["valid_loss"], abs=TOLERANCE
    )
    assert math.exp(-said / words) == pytest.approx(numbers["word_perplexity"], rel=TOLERANCE)


def test_acc_005_a_served_adapter_tells_stories_as_it_learned(trained: Server, teller: JobDir) -> None:
    """Its prompt is its task file's, without the guide of models that learned no stories; the base has that still."""
    body = {"first_sentence": FIRST, "seed": 3, "sentences": 1, "max_tokens": 8, "temperature": 0,
            "controls": [{"index": 2, "keywords": ["boat"]}]}  # fmt: skip
    told, base = (
        httpx.post(f"{trained.url}/v1/stories", json={**body, "model": model}, timeout=60).json()
        for model in ("teller", "writer")
    )
    sentence = told["sentences"][1]
    format_ = read_task(teller.root / "export")
    assert isinstance(format_, SentenceFormat)
    known = [fact["text"] for fact in sentence["facts"]]
    prompt = format_.pack([FIRST], load_tokenizer(read_job(teller.root).model_dir), keywords=["boat"], knowledge=known)
    plain = {"model": "teller", "prompt": list(prompt.tokens), "max_tokens": 8, "stop": ["\n"], "temperature": 0}
    plain["seed"] = seed_of(3, 2)
    text = httpx.post(f"{trained.url}/v1/generate", json=plain, timeout=60).json()["choices"][0]["text"]

    assert prompt.knowledge == len(known) > 0
    assert told["usage"]["prompt_tokens"] == len(prompt.tokens) < base["usage"]["prompt_tokens"]
    assert sentence["text"] == " ".join(text[: first_end(text)].split())
