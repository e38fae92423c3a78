"""Synthetic questions over HTTP and gRPC on tiny models: what is told, what repeats, what is kept, what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthesis.synthesizing import (
    PASSAGES,
    PATH,
    Asked,
    asker_of_both,
    parts,
    rounded,
    sceptic_of,
    serving_parts,
    tiny_asker,
    triples,
)
from tiny import tiny_llama

from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.question_writing import DRAWS
from trilithon_server.synthesis import seed_of
from trilithon_server.tasks.answer_match import exact_match
from trilithon_server.tasks.answer_spans import Proposal
from trilithon_server.tasks.question_format import QuestionFormat, read_question

TEXTS = {passage["id"]: passage["text"] for passage in PASSAGES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Path, Path, Path]:
    return parts(folder)


@pytest.fixture(scope="module")
def served(models: tuple[Path, Path, Path]) -> Iterator[Asked]:
    """All three parts, one rank each."""
    with serving_parts(*models) as asked:
        yield asked


def test_acc_E03_every_triple_stands_in_its_passage(served: Asked) -> None:
    """
    Passages in their order, answers where they are said to be and none twice, eight questions each; what is kept led
    back to its answer, itself or its pair, and each dropped one has its reason. Inverse seen red: offsets by one.
    """
    events = served.ask(questions_per_answer=8)
    found, names = triples(events), [name for name, _ in events]
    ends = [data for name, data in events if name == "passage"]
    last = events[-1][1]
    pairs: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for triple in found:
        pairs.setdefault((triple["passage_id"], triple["answer_start"], triple["answer"]), []).append(triple)

    assert (names[0], names[-1]) == ("started", "finished")
    assert events[0][1] | {"request_id": ""} == {
        "request_id": "", "seed": 7, "question_model": "words", "reader_model": "reader", "proposed_by": "proposer",
    }  # fmt: skip
    assert [end["passage_id"] for end in ends] == list(TEXTS)
    assert [end["answers"] for end in ends] == [5, 2, 1, 4, 5]  # all that there are in the short ones
    for triple in found:
        start = triple["answer_start"]
        assert TEXTS[triple["passage_id"]][start : start + len(triple["answer"])] == triple["answer"] != ""
        assert 0 < triple["p_answer"] <= 1
        assert triple["kept"] == (triple["reason"] == "")
    for (_, _, answer), items in pairs.items():
        assert len(items) == 8
        led_back = any(item["qa_answer"] and exact_match(item["qa_answer"], answer) for item in items)
        for item in items:
            if item["reason"] in ("no_answer", "other_answer"):
                assert not led_back
            elif item["kept"]:
                assert led_back
    assert {item["passage_id"] for item in found if item["kept"]} >= {"sure"}
    assert {"other_answer", "unreadable"} <= {item["reason"] for item in found}
    assert last["passages"] == len(PASSAGES)
    assert last["triples"] == len(found)
    assert last["kept"] == sum(item["kept"] for item in found)
    assert last["dropped"] == Counter(item["reason"] for item in found if not item["kept"])
    assert last["finish_reason"] is None
    assert last["usage"]["generated_tokens"] > 0


def test_E3_grpc_tells_the_same(served: Asked) -> None:
    """Both protocols tell the same events."""
    for mode in ("pair_any", "single"):
        events, messages = served.ask(filter=mode), served.call(filter=mode)
        told = [message for message in messages if message.WhichOneof("event") == "triple"]

        assert [name for name, _ in events] == [message.WhichOneof("event") for message in messages]
        assert [
            {
                "passage_id": m.triple.passage_id, "question": m.triple.question, "answer": m.triple.answer,
                "answer_start": m.triple.answer_start, "kept": m.triple.kept, "p_answer": m.triple.p_answer,
                "qa_prob": m.triple.qa_prob, "qa_answer": m.triple.qa_answer, "reason": m.triple.reason,
                "is_impossible": m.triple.is_impossible,
            }
            for m in told
        ] == triples(events)  # fmt: skip
        assert messages[-1].finished.kept == events[-1][1]["kept"]
        assert dict(messages[-1].finished.dropped) == events[-1][1]["dropped"]
        assert messages[0].started.proposed_by == "proposer"


def test_acc_E09_triples_repeat_in_any_batch_and_after_any_passage(served: Asked) -> None:
    """
    A passage's triples are the same whichever passages stand beside it and wherever a request begins; another seed
    gives others. Inverse seen red: the passage's number in its seed.
    """
    whole = triples(served.ask())
    again = triples(served.ask())
    alone = [triple for passage in PASSAGES for triple in triples(served.ask(passages=[passage]))]
    rest = triples(served.ask(passages=PASSAGES[3:]))
    turned = triples(served.ask(passages=PASSAGES[::-1]))

    assert whole == again
    assert rounded(alone) == rounded(whole)
    assert rounded(rest) == rounded([item for item in whole if item["passage_id"] in ("dark", "long")])
    assert sorted(map(str, rounded(turned))) == sorted(map(str, rounded(whole)))
    assert triples(served.ask(seed=8)) != whole


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_acc_E09_triples_are_those_of_every_layout(
    served: Asked, models: tuple[Path, Path, Path], sizes: dict[str, int]
) -> None:
    """Every model cut in two says what the whole ones say."""
    with serving_parts(*models, **sizes) as other:
        assert rounded(triples(other.ask())) == rounded(triples(served.ask()))


def test_without_a_filter_nothing_is_checked(served: Asked) -> None:
    """Everything that can be read is kept, and no reader is asked."""
    events = served.ask(filter="none")

    assert events[0][1]["reader_model"] == ""
    assert {item["reason"] for item in triples(events)} <= {"", "unreadable", "repeated"}
    assert all(item["qa_answer"] == "" for item in triples(events))


def test_acc_005_a_trained_model_is_asked_in_its_format(folder: Path, models: tuple[Path, Path, Path]) -> None:
    """
    A decoder with a task file of questions is prompted with the sequence that its recipe learns: the plain route writes
    the same behind it, with the same draws. Without a proposer a rule names answers, and the answer says so.
    """
    asker = tiny_asker(folder / "asker")
    with serving_parts(models[0], asker) as asked:
        events = asked.ask(passages=PASSAGES[:1], filter="none", answers_per_passage=3)
        found, text = triples(events), PASSAGES[0]["text"]
        assert events[0][1]["question_model"] == "asker"
        assert events[0][1]["proposed_by"] == "capitals_and_numbers"
        for i, triple in enumerate(found):
            start, number = triple["answer_start"], i % 2
            item = Proposal(start, start + len(triple["answer"]), triple["p_answer"])
            packed = QuestionFormat().pack(text, (item.start, item.end), load_tokenizer(asker))
            body = {
                "model": "asker", "prompt": list(packed.tokens), "max_tokens": 48, "stop": [":question"],
                "include_stop_str_in_output": True, "seed": seed_of(7, text, item, number), **DRAWS[number],
            }  # fmt: skip
            written = asked.http.post("/v1/generate", json=body).json()["choices"][0]["text"]
            assert triple["question"] == written.strip()

    assert len(found) == 6
    assert {text[item["answer_start"] :].split()[0] for item in found} <= {"The", "12", "144.", "Nobody", "1728."}


def test_questions_without_an_answer_are_asked_and_checked(folder: Path, models: tuple[Path, Path, Path]) -> None:
    """
    Beside the others, which stay as they are without them: each is prompted under its name, kept exactly where the
    reader finds no answer, and told as impossible; over gRPC the same. Inverse seen: both kinds prompted alike.
    """
    asker = asker_of_both(models[0], folder / "both")
    sceptic = sceptic_of(models[2], folder / "sceptic")
    options = {"passages": PASSAGES[:4], "model": "both", "answers_per_passage": 3, "unanswerable_per_answer": 2}
    with serving_parts(models[0], asker, models[1], sceptic, models[2]) as asked:
        events = asked.ask(**options)
        found = triples(events)
        plain = triples(asked.ask(**{**options, "unanswerable_per_answer": 0}))
        unchecked = triples(asked.ask(**options, filter="none"))
        calls = [event.triple for event in asked.call(
            PASSAGES[:4], model="both", answers_per_passage=3, unanswerable_per_answer=2
        ) if event.WhichOneof("event") == "triple"]  # fmt: skip
        item = next(item for item in unchecked if item["is_impossible"])
        start, text = item["answer_start"], PASSAGES[0]["text"]
        proposal = Proposal(start, start + len(item["answer"]), item["p_answer"])
        packed = QuestionFormat(unanswerable=True).pack(
            text, (proposal.start, proposal.end), load_tokenizer(asker), answerable=False
        )
        body = {
            "model": "both", "prompt": list(packed.tokens), "max_tokens": 48, "stop": [":question"],
            "include_stop_str_in_output": True, "seed": seed_of(7, text, proposal, 8), **DRAWS[0],
        }  # fmt: skip
        written = asked.http.post("/v1/generate", json=body).json()["choices"][0]["text"]
        wrong = ({"model": "words"}, {"model": "both", "reader_model": "reader"}, {"unanswerable_per_answer": 9})
        refused = [
            asked.http.post(PATH, json={"passages": PASSAGES[:1], "unanswerable_per_answer": 1, **more}).json()["error"]
            for more in wrong
        ]

    impossible = [item for item in found if item["is_impossible"]]
    assert rounded([item for item in found if not item["is_impossible"]]) == rounded(plain)
    assert len(impossible) == len(plain) > 0
    assert {item["reason"] for item in impossible} >= {"", "answered"}
    assert item["question"] == (read_question(written) or written.strip())
    for item in impossible:
        assert item["kept"] == (item["reason"] == "")
        assert (item["reason"] == "answered") <= (item["qa_answer"] != "")
        assert not (item["kept"] and item["qa_answer"])
    assert [(call.question, call.is_impossible, call.kept, call.reason) for call in calls] == [
        (item["question"], item["is_impossible"], item["kept"], item["reason"]) for item in found
    ]
    assert [error["code"] for error in refused[:2]] == ["unsupported_model"] * 2
    assert "has not learned" in refused[0]["message"]
    assert "answers every question" in refused[1]["message"]
    assert refused[2]["param"] == "unanswerable_per_answer"


def test_token_types_travel_to_the_engine(folder: Path, models: tuple[Path, Path, Path]) -> None:
    """A model with a table of types is asked with them; what it writes differs from what it writes without."""
    typed, plain = tiny_asker(folder / "typed", roles="types"), tiny_asker(folder / "plain")
    with serving_parts(models[0], typed, plain) as asked:
        found = [
            triples(asked.ask(passages=PASSAGES[:1], filter="none", model=name, answers_per_passage=2))
            for name in ("typed", "plain")
        ]

    assert [item["answer"] for item in found[0]] == [item["answer"] for item in found[1]]
    assert [item["question"] for item in found[0]] != [item["question"] for item in found[1]]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"passages": []}, "passages", "must hold from 1 to 64"),
        (
            {"passages": [{"id": str(n), "text": "a"} for n in range(65)]},
            "passages",
            "trilithon synth-qa",
        ),
        ({"passages": [{"id": "a", "text": ""}]}, "passages[0]", "must not be empty"),
        ({"passages": [{"id": "", "text": "a"}]}, "passages[0].id", "must not be empty"),
        ({"passages": PASSAGES[:1] * 2}, "passages[1].id", "must be given once"),
        ({"answers_per_passage": 21}, "answers_per_passage", "must be from 1 to 20"),
        ({"questions_per_answer": -1}, "questions_per_answer", "must be from 1 to 8"),
        ({"filter": "both"}, "filter", "pair_any"),
        ({"filter": "none", "reader_model": "reader"}, "reader_model", "nothing is checked"),
        ({"model": "reader"}, None, "cannot generate"),
        ({"answer_model": "reader"}, None, "cannot propose answers"),
        ({"reader_model": "nobody"}, None, "nobody"),
        ({"n": 3}, "n", "unknown parameter"),
        ({"top_p": 2}, "top_p", "must be greater than 0"),
    ],
)
def test_R11_what_cannot_be_done_is_told(served: Asked, body: dict[str, Any], param: str | None, says: str) -> None:
    """One sentence with the field, before the first event."""
    response = served.http.post(PATH, json={"passages": PASSAGES, **body})
    error = response.json()["error"]

    assert 400 <= response.status_code < 500
    assert says in error["message"]
    if param is not None:
        assert error["param"] == param


def test_R11_a_filter_needs_a_reader(folder: Path, models: tuple[Path, Path, Path]) -> None:
    """Without one the request is refused, and with `none` it is answered."""
    with serving_parts(models[0]) as asked:
        error = asked.http.post(PATH, json={"passages": PASSAGES}).json()["error"]

        assert "span_qa" in error["message"] or "the filter needs one" in error["message"]
        assert triples(asked.ask(filter="none"))


def test_R11_an_answer_that_a_model_has_no_room_for_is_told(folder: Path) -> None:
    """
    A table, and a name without an end: their questions are not asked, and the passages beside them have theirs.
    Inverses seen red: the whole request refused for either.
    """
    table, name = " ".join(str(n) for n in range(1000, 2000)), "A" * 5020
    passages = [{"id": "table", "text": table}, {"id": "endless", "text": name}, PASSAGES[1]]
    with serving_parts(tiny_llama(folder / "short", vocab=150, context=512)) as asked:
        found = triples(asked.ask(passages=passages, filter="none"))
    reasons: dict[str, list[str]] = {passage["id"]: [] for passage in passages}
    for item in found:
        reasons[item["passage_id"]].append(item["reason"])

    assert reasons["table"] == ["too_long"] * 10
    assert reasons["endless"] == ["too_long"] * 2
    assert len(reasons["name"]) == 2
    assert "too_long" not in reasons["name"]


def test_R7_the_time_limit_leaves_out_whole_passages(served: Asked) -> None:
    """What was done stands, the end says that it is not all, and the next request is answered."""
    many = [{"id": str(n), "text": TEXTS["long"]} for n in range(40)]
    events = served.ask(passages=many, time_limit_ms=1500)
    ends = [data["passage_id"] for name, data in events if name == "passage"]
    last = events[-1][1]

    assert last["finish_reason"] == "time_limit"
    assert last["passages"] == len(ends) < 40
    assert len(triples(events)) == 10 * len(ends)
    assert served.ask(passages=PASSAGES[:1])[-1][1]["finish_reason"] is None


@pytest.mark.slow
def test_acc_E09_a_real_model_asks_in_words_at_every_layout(
    smollm2_dir: Path,
) -> None:
    """
    SmolLM2-Instruct, which never learned to ask, writes questions through its chat template; its triples repeat, and in
    two stages they are those of one. Of the questions at least half can be read.
    """
    passages = PASSAGES[:1]
    found = []
    for pp in (1, 2):
        with serving_parts(smollm2_dir, pp=pp) as asked:
            events = [asked.ask(passages=passages, filter="none", answers_per_passage=3) for _ in range(2)]
        assert triples(events[0]) == triples(events[1])
        assert events[0][0][1]["proposed_by"] == "capitals_and_numbers"
        found.append(triples(events[0]))

    assert rounded(found[0]) == rounded(found[1])
    assert sum(item["kept"] for item in found[0]) >= 3
    assert all(item["question"].endswith("?") for item in found[0] if item["kept"])
