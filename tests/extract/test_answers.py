"""The four extraction calls over HTTP, gRPC and the client: equal answers in characters of the original."""

from __future__ import annotations

import dataclasses
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_driver import Driver
from extracting import BODIES, LONG, PATHS, QUESTION, TEXT, Served
from tiny_tasks import Task

from trilithon import Client
from trilithon._messages import message_fields
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.engine.inprocess import InProcessEngine
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Pooling
from trilithon_server.tasks import read_task
from trilithon_server.tasks.pieces import Encoded, WordPieces
from trilithon_server.tasks.spans import merge_answers

FLOAT32 = 1e-6  # in this process probabilities are doubles


def in_process(directory: Path, task: Task) -> dict[str, Any]:
    """What the task's format makes of the logits of an engine in this process, in the shape of the JSON answer."""
    pieces, known = WordPieces(load_tokenizer(directory)), read_task(directory)
    body = BODIES[task]
    engine = InProcessEngine(EngineSpec(name="test", model_dir=str(directory), num_threads=1))
    driver = Driver(engine)

    def run(encoded: Encoded) -> Any:
        answer = driver.answer(encoded.tokens, types=encoded.types, pooling=Pooling(task_logits=True))
        columns = {"ner": 5, "span_qa": 2}.get(task, 3)
        return np.frombuffer(answer.last.task_logits, np.float32).reshape(-1, columns)

    assert known is not None
    try:
        if task == "ner":
            tagged = [known.encode_text(text, pieces) for text in body["texts"]]
            found = [
                known.decode_text(text, one, [run(window.encoded) for window in one.windows])
                for text, one in zip(body["texts"], tagged, strict=True)
            ]
            return {"documents": [{"entities": [vars_of(entity) for entity in one]} for one in found]}
        if task == "relation":
            mentions = [(Span(**pair["a"]), Span(**pair["b"])) for pair in body["pairs"]]
            labels = [known.decode(run(known.encode(TEXT, a, b, pieces))[0]) for a, b in mentions]
            return {"relations": [{"label": one.label, "score": one.score} for one in labels]}
        if task == "classify":
            pairs = zip(body["texts"], body["text_pairs"], strict=True)
            labels = [known.decode(run(known.cut(text, pieces, other))[0]) for text, other in pairs]
            return {"results": [{"label": one.label, "score": one.score} for one in labels]}
        parts = []
        for i, text in enumerate(body["contexts"]):
            windows = known.encode(QUESTION, text, pieces)
            parts.append(known.decode(text, windows, [run(window.encoded) for window in windows], index=i))
        answers, null = merge_answers(parts, n_best=7)
        return {"answers": [vars_of(one) for one in answers], "no_answer_probability": null}
    finally:
        engine.close()


@dataclass
class Span:
    start: int
    end: int
    type: str
    text: str = ""


def vars_of(item: Any) -> dict[str, Any]:
    """A slotted dataclass as a dictionary."""
    return dataclasses.asdict(item)


def assert_close(expected: Any, actual: Any, *, by: float = FLOAT32) -> None:
    """Every field of `expected` is in `actual`, numbers that are no whole ones within `by`."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert_close(value, actual[name], by=by)
    elif isinstance(expected, list):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_close(one, other, by=by)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=0, abs=by)
    else:
        assert actual == expected


@pytest.mark.parametrize("task", PATHS)
def test_E3_http_grpc_client_and_in_process_answer_alike(served: Served, task: Task) -> None:
    """
    One request has one answer, whatever it comes by, numbers to the last digit; long texts are read in several windows.

    Inverse: types left out of the submitted windows turn the question's and the text pairs' cases red; so do doubles
    over HTTP.
    """
    over_http = served.ask(task, **BODIES[task])
    over_grpc = served.call(task, **BODIES[task])

    assert over_http.status_code == 200, over_http.text
    document = over_http.json()
    expected = in_process(served.dirs[task], task)
    expected.pop("score", None)
    if task == "span_qa":
        for answer in expected["answers"]:
            answer.pop("score")
    assert_close(expected, document)
    told = {name: value for name, value in document.items() if name not in ("timings", "usage")}
    filled = json.loads(json.dumps(fill(message_fields(over_grpc), told)))
    assert filled == told
    for url in (served.server.url, served.server.grpc_target):
        with Client(url) as client:
            by_client = json.loads(json.dumps(vars_of(ask_client(client, task)), default=dict))
            assert_close(told, by_client, by=0)


def fill(fields: Any, like: Any) -> Any:
    """Fields of a message with the zeros that protobuf leaves out, as `like` has them."""
    if isinstance(like, dict):
        empty = {str: "", int: 0, float: 0.0, bool: False, list: [], dict: {}}
        return {name: fill(fields.get(name, empty[type(value)]), value) for name, value in like.items()}
    if isinstance(like, list):
        return [fill(one, other) for one, other in zip(fields, like, strict=True)]
    return fields


def ask_client(client: Client, task: Task) -> Any:
    """The same request by the client library."""
    body = BODIES[task]
    if task == "ner":
        return client.extract.annotate(body["texts"], model=task)
    if task == "relation":
        return client.extract.relations(TEXT, pairs=[(p["a"], p["b"]) for p in body["pairs"]], model=task)
    if task == "span_qa":
        return client.extract.answer(QUESTION, body["contexts"], n_best=7, model=task)
    return client.extract.classify(body["texts"], text_pairs=body["text_pairs"], model=task)


def test_offsets_are_characters_of_the_original(served: Served) -> None:
    """Every entity and answer is the piece of the original that its offsets name: accents, emoji, tabs and all."""
    texts = [LONG, "na\u00efve\t\tcaf\u0065\u0301  \U0001f9ea\U0001f9ea (x)\n\u4e2d\u6587 IL-2"]
    documents = served.ask("ner", texts=texts).json()["documents"]
    answers = served.ask("span_qa", question=QUESTION, contexts=texts).json()["answers"]

    found = [(texts[i], entity) for i, document in enumerate(documents) for entity in document["entities"]]
    assert found
    assert answers
    for text, item in [*found, *((texts[answer["context"]], answer) for answer in answers)]:
        assert item["text"] == text[item["start"] : item["end"]]


def test_types_filter_entities(served: Served) -> None:
    """`types` keeps entities of these types and changes none of them."""
    everything = served.ask("ner", texts=[LONG]).json()["documents"][0]["entities"]
    genes = served.ask("ner", texts=[LONG], types=["GENE"]).json()["documents"][0]["entities"]

    assert genes == [entity for entity in everything if entity["type"] == "GENE"]
    assert 0 < len(genes) < len(everything)


def test_relations_of_found_entities(served: Served) -> None:
    """A tagger's entities, the same ones sent back, and their pairs sent one by one have the same relations."""
    entities = served.ask("ner", texts=[TEXT]).json()["documents"][0]["entities"]
    by_tagger = served.ask("relation", text=TEXT, tagger="ner").json()
    by_entities = served.ask("relation", text=TEXT, entities=entities).json()
    by_pairs = served.ask("relation", text=TEXT, pairs=[one["pair"] for one in by_tagger["relations"]]).json()

    labels = [[(one["label"], one["score"]) for one in answer["relations"]] for answer in (by_tagger, by_entities)]
    assert labels[0]
    assert labels[0] == labels[1] == [(one["label"], one["score"]) for one in by_pairs["relations"]]
    assert by_tagger["negative_label"] == "false"
    assert by_tagger["usage"]["prompt_tokens"] > by_entities["usage"]["prompt_tokens"]


def test_more_pairs_than_a_request_may_ask_are_counted(served: Served) -> None:
    """Of many candidates the first 200 are asked about, and the answer tells how many were not."""
    words = [
        "a",
        "b",
        "c",
        "d",
        "e",
        "f",
        "g",
        "h",
        "i",
        "j",
        "k",
        "l",
        "m",
        "n",
        "o",
        "p",
        "q",
        "r",
        "s",
        "t",
        "u",
        "v",
        "w",
        "x",
        "y",
        "z",
        "a",
        "b",
        "c",
        "d",
    ]
    text = " ".join(words)
    kinds = ("CHEMICAL", "GENE")
    entities = [{"start": 2 * i, "end": 2 * i + 1, "type": kinds[i % 2]} for i in range(len(words))]

    answer = served.ask("relation", text=text, entities=entities).json()

    assert len(answer["relations"]) == 200
    assert answer["pairs_dropped"] == 15 * 15 - 200


def test_one_context_keeps_places_and_several_add_up(served: Served) -> None:
    """Probabilities of one context are those of its candidates; the same context twice changes no probability."""
    once = served.ask("span_qa", question=QUESTION, contexts=[TEXT], n_best=20).json()
    twice = served.ask("span_qa", question=QUESTION, contexts=[TEXT, TEXT], n_best=20).json()

    total = sum(answer["probability"] for answer in once["answers"]) + once["no_answer_probability"]
    assert total == pytest.approx(1.0)
    assert twice["no_answer_probability"] == pytest.approx(once["no_answer_probability"])
    assert len(served.ask("span_qa", question=QUESTION, contexts=[TEXT]).json()["answers"]) == 5


def test_a_request_chooses_when_there_is_no_answer(served: Served) -> None:
    """Its threshold is used in place of the model's own, zero too, over both protocols; unset it is the model's."""
    body: dict[str, Any] = {"question": QUESTION, "contexts": [TEXT]}
    thresholds: dict[float | None, bool] = {-1e6: True, 1e6: False, None: False}
    found = {
        value: [
            served.ask("span_qa", **body, null_threshold=value).json()["no_answer"],
            served.call("span_qa", **body, null_threshold=value).no_answer,
        ]
        for value in thresholds
    }
    zero = served.ask("span_qa", **body, null_threshold=0.0).json()

    assert found == {value: [expected, expected] for value, expected in thresholds.items()}
    assert zero["no_answer"] == (zero["no_answer_probability"] > zero["answers"][0]["probability"])


def test_a_long_class_text_is_cut_and_says_so(served: Served) -> None:
    """What is longer than the model reads is answered from its beginning, marked as such."""
    results = served.ask("classify", texts=[TEXT * 5, "short"]).json()["results"]

    assert [result["truncated"] for result in results] == [True, False]
    assert all(sum(result["probs"].values()) == pytest.approx(1.0) for result in results)


def test_E2_answers_do_not_depend_on_the_batch(served: Served) -> None:
    """Many requests at once, of all tasks, have the answers that each has alone."""
    rng = random.Random(5)
    asked: list[tuple[Task, dict[str, Any]]] = []
    for _ in range(24):
        task = rng.choice(list(PATHS))
        cut = rng.randrange(10, len(LONG))
        body = {
            "ner": {"texts": [LONG[:cut]]},
            "relation": BODIES["relation"],
            "span_qa": {"question": QUESTION, "contexts": [LONG[:cut]]},
            "classify": {"texts": [LONG[:cut], TEXT]},
        }[task]
        asked.append((task, body))
    alone = [served.ask(task, **body).json() for task, body in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: served.ask(one[0], **one[1]).json(), asked))

    for one, other in zip(alone, together, strict=True):
        for answer in (one, other):
            answer.pop("timings")
        assert_close(one, other)


def test_counts_and_times_are_told(served: Served) -> None:
    """Usage counts the tokens of all windows, times are there, and the metrics know the model."""
    answer = served.ask("ner", texts=[TEXT, LONG]).json()
    known, pieces = read_task(served.dirs["ner"]), WordPieces(load_tokenizer(served.dirs["ner"]))
    assert known is not None
    windows = [window for text in (TEXT, LONG) for window in known.encode_text(text, pieces).windows]

    assert len(windows) > 10
    assert answer["usage"]["prompt_tokens"] == sum(len(window.encoded.tokens) for window in windows)
    assert answer["usage"]["generated_tokens"] == 0
    assert 0 < answer["timings"]["prefill_ms"] <= answer["timings"]["total_ms"]
    assert answer["model"] == "ner"
    metrics = served.http.get("/metrics").text
    line = 'trilithon_requests_total{code="ok",finish_reason="",model="ner",route="/v1/extract/entities"}'
    assert line in metrics
    assert 'trilithon_queue_seconds_count{model="ner"}' in metrics


def test_models_tell_what_they_can(served: Served) -> None:
    """Each model lists its task among what it can do; all of them still embed."""
    data = served.http.get("/v1/models").json()["data"]
    can = {model["id"]: model["capabilities"] for model in data}

    names = {"ner": "annotate", "relation": "relations", "span_qa": "answer", "classify": "classify"}
    assert {name: can[name][0] for name in names} == names
    assert all(can[name][1:] == ["embed", "tokenize"] for name in names)
    assert can["plain"] == ["embed", "tokenize"]
    embedded = served.http.post("/v1/embeddings", json={"model": "ner", "input": TEXT})
    assert embedded.status_code == 200
