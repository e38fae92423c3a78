"""Masked salient spans: what is salient, what reader and retriever read, and which passage is no evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reader_facts as facts
import torch
from finetune_jobs import JobDir, twin
from safetensors.numpy import load_file

from trilithon_finetune.data.salient import salient_spans
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.phases.verify_reader import loaded_reader
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import Context, Retriever, Sample
from trilithon_finetune.recipes.openqa import own_key
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.evidence import Evidence
from trilithon_finetune.train.reading import Readings
from trilithon_finetune.train.work import open_work
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks.reader_format import passage_tokens
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.tasks.writing import special

MSS = RECIPES["mss"]
SharedData = Callable[[str], Path]
TEXT = "key0 box1 lid2 coin3 ring4"
ENTITIES = [["box1", "ORG", 5, 9], ["coin3", "ORG", 15, 20], ["ring4", "ORG", 21, 26]]
ROW: dict[str, Any] = {"doc_id": 7, "sent_text": TEXT, "linguistic_ent": ENTITIES}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    facts.write_tokenizer(folder)
    return load_tokenizer(folder)


def context_of(tokenizer: Tokenizer, **options: Any) -> Context:
    """The same words for reader and retriever."""
    named = {"retriever": "r", "passages": "p", **options}
    return Context(
        tokenizer=tokenizer,
        template=None,
        model=facts.READER,
        max_tokens=96,
        labels=(),
        options=MSS.Options.model_validate(named),
        retriever=Retriever(tokenizer, RetrievalFormat(), facts.RETRIEVER),
    )


def samples_of(row: dict[str, Any], context: Context) -> list[Sample]:
    found = MSS.encode(row, 3, context, file="f")
    assert all(isinstance(item, Sample) for item in found), found
    return [item for item in found if isinstance(item, Sample)]


def shown(tokens: tuple[int, ...], tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.id_to_piece(token) for token in tokens)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The mason met Ada Noor in the Bay of Biscay.", ["Ada Noor", "Bay of Biscay"]),
        ("Nobody came on 3 May, 1921, to Rome.", ["3 May, 1921", "Rome"]),
        ("NASA and iPhone-users paid 6.5% to O'Neill.", ["NASA", "6.5", "O'Neill"]),
        ("Nothing here is salient.", []),
        ("", []),
    ],
)
def test_names_numbers_and_dates_are_salient(text: str, expected: list[str]) -> None:
    """Runs of capitals and digits; a sentence's first word is no name for being the first."""
    assert [text[start:end] for start, end in salient_spans(text)] == expected


def test_spans_are_masked_for_both_and_written_behind_their_marks(tokenizer: Tokenizer) -> None:
    """At most half of the salient spans, in their order; the choice hangs on the sentence alone."""
    context = context_of(tokenizer)
    (sample,) = samples_of(ROW, context)
    query, question = sample.columns["query"], sample.columns["question"]
    (gold,) = MSS.golds(ROW, 0, context)  # type: ignore[attr-defined]  # of a reader
    said = sample.tokens[query + question :]
    masked = TEXT.replace(gold, "[MASK]")

    assert gold in ("box1", "coin3", "ring4")
    assert shown(sample.tokens[:query], tokenizer) == f"[CLS] {masked} [SEP]"
    assert shown(sample.tokens[query : query + question], tokenizer) == (
        f"[CLS] {masked} [SEP]".replace("[MASK]", "<extra_id_0>")
    )
    assert shown(said, tokenizer) == f"[PAD] <extra_id_0> {gold}"
    assert shown(sample.targets[query + question :], tokenizer) == f"<extra_id_0> {gold} [SEP]"
    assert sample.columns["own"] == own_key("7")
    assert samples_of(ROW, context) == [sample]


def test_several_spans_have_marks_of_their_own(tokenizer: Tokenizer) -> None:
    """Of six salient spans three are masked."""
    words = [f"{kind}0" for kind in facts.KINDS]
    text = " hold ".join(words)
    (sample,) = samples_of({"doc_id": "a", "sent_text": text}, context_of(tokenizer, max_spans=3))
    question = shown(sample.tokens[sample.columns["query"] :], tokenizer)

    assert [question.count(f"<extra_id_{number}>") for number in range(4)] == [2, 2, 2, 0]
    assert question.index("<extra_id_0>") < question.index("<extra_id_1>") < question.index("<extra_id_2>")


def long_row(tokenizer: Tokenizer, *, spans: int) -> dict[str, Any]:
    """A sentence of 200 words, the first of its names far behind what a question has room for."""
    words = ["hold"] * 200
    for number in range(2 * spans):
        words[90 + 50 * number // spans] = f"key{number}"
    text = " ".join(words)
    names = [f"key{number}" for number in range(2 * spans)]
    entities = [[name, "ORG", text.index(name), text.index(name) + len(name)] for name in names]
    return {"doc_id": "a", "sent_text": text, "linguistic_ent": entities}


@pytest.mark.parametrize("spans", [1, 3])
def test_a_long_sentence_is_cut_around_its_masks(tokenizer: Tokenizer, spans: int) -> None:
    """Reader and retriever see every mask, and what stands beside it. Inverse seen: the sentence cut at its end."""
    (sample,) = samples_of(long_row(tokenizer, spans=spans), context_of(tokenizer, max_spans=spans))
    query = shown(sample.tokens[: sample.columns["query"]], tokenizer).split()
    question = shown(sample.tokens[sample.columns["query"] :][: sample.columns["question"]], tokenizer).split()

    assert (len(query), len(question)) == (64, 66)
    assert query.count("[MASK]") == spans
    assert [question.count(f"<extra_id_{number}>") for number in range(spans)] == [1] * spans
    assert [question[0], question[-1]] == ["[CLS]", "[SEP]"]
    assert spans > 1 or query.index("[MASK]") in (31, 32)


def test_a_short_cut_keeps_the_masks_alone(tokenizer: Tokenizer) -> None:
    """A place for each mask is enough; with fewer the option is refused by its name."""
    row, options = long_row(tokenizer, spans=3), {"max_spans": 3}
    (sample,) = samples_of(row, context_of(tokenizer, max_question_tokens=3, **options))
    question = shown(sample.tokens[sample.columns["query"] :][: sample.columns["question"]], tokenizer)

    assert question == "[CLS] <extra_id_0> <extra_id_1> <extra_id_2> [SEP]"
    with pytest.raises(FinetuneError, match="max_question_tokens must be at least 3") as caught:
        MSS.encode(row, 1, context_of(tokenizer, max_question_tokens=2, **options), file="f")
    assert caught.value.error.param == "options.max_question_tokens"


def test_no_real_sentence_loses_its_mask(
    tokenizer: Tokenizer, minilm_tokenizer: Tokenizer, shared_data: SharedData
) -> None:
    """Of real articles, whose longest sentences have hundreds of words. Inverse seen: sentences cut at their end."""
    marks = [special(name, held) for name, held in (("[MASK]", minilm_tokenizer), ("<extra_id_0>", tokenizer))]
    retriever = Retriever(minilm_tokenizer, RetrievalFormat(), facts.RETRIEVER)
    context, seen = replace(context_of(tokenizer), retriever=retriever), 0
    with shared_data("pretrain/wikipedia_en_articles.jsonl").open(encoding="utf-8") as file:
        for line in islice(file, 12):
            for asked in MSS.asked({"text": json.loads(line)["text"]}, context):  # type: ignore[attr-defined]
                assert [list(asked.query).count(marks[0]), list(asked.question).count(marks[1])] == [1, 1]
                seen += 1
    assert seen > 1000


def test_a_passage_gives_a_question_for_each_sentence(tokenizer: Tokenizer) -> None:
    """Those that have a salient span; all are of the same passage."""
    row = {"title": "t", "text": "Hold key1 hold. Hold it all. Then hold box2 here."}
    samples = samples_of(row, context_of(tokenizer))

    assert [sample.part for sample in samples] == [0, 1]
    assert {sample.columns["own"] for sample in samples} == {own_key(f"t\0{row['text']}")}
    assert samples_of({**row, "id": "p9"}, context_of(tokenizer))[0].columns["own"] == own_key("p9")


@pytest.mark.parametrize(
    ("row", "code", "path"),
    [
        ({"sent_text": "a"}, "E-DATA-008", "doc_id"),
        ({**ROW, "linguistic_ent": [["box1", "ORG", 4, 8]]}, "E-DATA-041", "linguistic_ent[0]"),
        ({**ROW, "linguistic_ent": [["box1", "ORG"]]}, "E-DATA-008", "linguistic_ent[0]"),
        ({"text": " "}, "E-DATA-015", "text"),
        ({"text": "a", "titel": "b"}, "E-DATA-007", "titel"),
    ],
)
def test_R11_what_is_wrong_with_a_row_is_told(row: dict[str, Any], code: str, path: str) -> None:
    """Places that are not there, among others."""
    found = MSS.check(row, MSS.detect(row) or "", file="f", line=1)

    assert (found[0].code, found[0].path) == (code, path)


def test_R11_nothing_salient_is_nothing_to_learn(tokenizer: Tokenizer) -> None:
    """A finding of the row."""
    (found,) = MSS.encode({"text": "hold it"}, 1, context_of(tokenizer), file="f")

    assert getattr(found, "code", "") == "E-DATA-022"


def test_a_sentences_own_passage_is_no_evidence(tmp_path: Path) -> None:
    """
    Each masked answer stands in one passage, that of the sentence itself: with its id nothing that holds the answer is
    ever found; with another's id it is. Inverse seen: own passages left in.
    """
    retriever = facts.write_model(tmp_path / "retriever", facts.RETRIEVER, seed=2, sigma=0.2)
    reader, found = facts.new_reader(tmp_path / "reader"), []
    for shift in (0, 1):
        rows = [
            {
                "doc_id": f"p{(i + shift) % facts.NUM_FACTS}",
                "sent_text": item["text"],
                "linguistic_ent": [[answer, "ORG", item["text"].index(answer), len(item["text"])]],
            }
            for i, item in enumerate(facts.passages()[:32])
            for answer in [item["text"].split(" ", 2)[2]]
        ]
        made = facts.reader_job(
            tmp_path / f"job{shift}", reader, retriever=retriever, train=rows[16:], valid=rows[:16], again=False,
            task="mss", options={"top_k": 3, "max_question_tokens": 8}, training={"max_steps": 1, "batch_size": 16},
        ).walk()  # fmt: skip
        found.append(made.events("eval")[-1]["data"]["top_5"])

    assert found[0] == 0.0
    assert found[1] > 0.0


def test_spans_are_looked_for_one_by_one(tmp_path: Path) -> None:
    """
    Two spans of a sentence, of which no passage has one behind the other: a passage that holds either is found. Inverse
    seen: both looked for as one text, which is found nowhere.
    """
    folder = tmp_path / "two"
    rows = [{"doc_id": "elsewhere", "sent_text": two_spans(item["text"])} for item in facts.passages()[:24]]
    for row in rows:
        words = {word: row["sent_text"].index(word) for word in row["sent_text"].split() if word != "hold"}
        row["linguistic_ent"] = [[word, "ORG", at, at + len(word)] for word, at in words.items()]
    made = facts.reader_job(
        folder, facts.new_reader(tmp_path / "reader"),
        retriever=facts.write_model(tmp_path / "retriever", facts.RETRIEVER, seed=2, sigma=0.2),
        train=rows[8:], valid=rows[:8], again=False, task="mss",
        options={"top_k": 3, "max_question_tokens": 8, "max_spans": 2, "max_answer_tokens": 8},
        training={"max_steps": 1, "batch_size": 8},
    ).walk()  # fmt: skip
    work = open_work(read_job(made.root))
    spans = MSS.looked_for(rows[0], 0, work.context)  # type: ignore[attr-defined]  # of a reader

    assert len(spans) == 2
    assert MSS.golds(rows[0], 0, work.context) == [" ".join(spans)]  # type: ignore[attr-defined]
    assert made.events("eval")[-1]["data"]["top_5"] > 0.0


def two_spans(text: str) -> str:
    """The words of a fact from its last to its first, with another word between any two."""
    return " hold ".join(reversed(text.split()))


def masked_facts(folder: Path, **config: Any) -> JobDir:
    """Sentences of the facts whose last two words are masked, each found in its own passage alone."""
    rows = [
        {
            "doc_id": "elsewhere",
            "sent_text": item["text"],
            "linguistic_ent": [[answer, "ORG", item["text"].index(answer), len(item["text"])]],
        }
        for item in facts.passages()[:24]
        for answer in [item["text"].split(" ", 2)[2]]
    ]
    folder.mkdir()
    retriever = facts.write_model(folder / "retriever", facts.RETRIEVER, seed=2, sigma=0.2)
    return facts.reader_job(
        folder / "job",
        facts.new_reader(folder / "reader"),
        retriever=retriever,
        train=rows[8:],
        valid=rows[:8],
        again=False,
        task="mss",
        options={"top_k": 3, "max_question_tokens": 8, **config.pop("options", {})},
        training={"max_steps": 2, "batch_size": 8},
        **config,
    )


def test_the_last_passage_is_empty(tmp_path: Path) -> None:
    """
    Beside two that are found stands one that says nothing, and `retriever_utility` is by how much all three make the
    spans likelier than it alone does, by the exported models. Inverse seen: the utility of the first passage found.
    """
    made = masked_facts(tmp_path / "with").walk()
    work, export = open_work(read_job(made.root)), made.root / "export"
    evidence = Evidence(work)
    readings, stage, part = Readings(work, evidence), loaded_reader(work, export), work.prepared.valid
    alone = []
    for unit in range(part.num_units):
        reading = readings.reading(part, unit, ())
        batch = readings.batch([reading], [unit], device=torch.device("cpu"))
        with torch.inference_mode():
            memory = batch.run(stage, None, dropout=None)
            alone.append(float(batch.outputs(stage, memory, grid=stage.grid, per_token=False)[0, 0]))
        assert reading.rows == (len(facts.passages()),)
    last = made.events("eval")[-1]["data"]
    recorded = load_file(next(made.run.glob("probe_*.safetensors")))

    assert evidence.read(evidence.null_row) == tuple(passage_tokens("", "", work.context.tokenizer))
    assert last["retriever_utility"] == pytest.approx(-last["valid_loss"] - np.mean(alone), abs=1e-4)
    assert abs(last["retriever_utility"]) > 1e-3
    for values in recorded.values():
        assert [row == evidence.null_row for row in values[:3]] == [False, False, True]


def test_without_the_empty_passage_all_are_found(tmp_path: Path) -> None:
    """`null_passage: false`: three passages, and no utility; one passage has no room for the empty one."""
    made = masked_facts(tmp_path / "without", options={"null_passage": False}).walk()
    single = masked_facts(tmp_path / "single", options={"top_k": 1}).try_phase("validate")
    recorded = load_file(next(made.run.glob("probe_*.safetensors")))

    assert "retriever_utility" not in made.events("eval")[-1]["data"]
    assert all(max(values[:3]) < len(facts.passages()) for values in recorded.values())
    assert "top_k must be at least 2" in single["error"]["message"]


def test_E8_masked_spans_are_learned_the_same_by_two_rows(tmp_path: Path) -> None:
    """Losses and numbers of two data-parallel ranks are those of one process."""
    alone = masked_facts(tmp_path / "alone")
    alone.phase("validate")
    alone.phase("prepare")
    other = twin(alone, tmp_path / "other")
    other.configure("parallel", dp=2)
    alone.train_here()
    other.train()
    numbers = [made.events("eval")[-1]["data"] for made in (alone, other)]

    assert alone.losses() == pytest.approx(other.losses(), rel=1e-5)
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
