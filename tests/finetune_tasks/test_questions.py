"""Recipes of proposed answers and of questions about them: samples, what can't be learned, numbers, real rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_tasks.encoder_fixtures import ASKED, context_for, letter_tokenizer
from tiny_tokenizers import write_bpe_tokenizer

from trilithon_finetune.converters import convert
from trilithon_finetune.converters.squad import read_squad
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.metrics.questions import proposal_recall, rouge_l
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import IGNORE, Output, Sample
from trilithon_finetune.train.evaluation import sample_loss
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks import task_format
from trilithon_server.tasks.question_format import QuestionFormat

ANSWERS, QUESTIONS = RECIPES["answer_gen"], RECIPES["question_gen"]
TEXT = "The mill stood still. The miller counted 12 sacks. Nobody came. He slept."
ROW = {"context": TEXT, "question": "How many sacks?", "answers": [{"text": "12", "answer_start": TEXT.index("12")}]}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return letter_tokenizer(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bytes")
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    return load_tokenizer(path)


def samples(found: Sequence[Any]) -> list[Sample]:
    assert all(isinstance(item, Sample) for item in found), found
    return list(found)


def test_an_answer_is_learned_in_every_window_that_holds_it(letters: Tokenizer) -> None:
    """Its tokens among those of the context; to judge, the other windows too, for which no loss counts."""
    context = context_for(ANSWERS, letters, max_tokens=8, options={"doc_stride": 3, "max_answer_tokens": 4})
    (learned,) = samples(ANSWERS.encode(ASKED, 3, context, file="f"))
    judged = samples(ANSWERS.encode(ASKED, 3, replace(context, validating=True), file="f"))

    assert learned.columns == {"start": 2, "end": 2, "context_start": 1, "context_stop": 7, "only_scored": 0}
    assert judged[0] == learned
    assert len(judged) > 1
    assert [sample.num_supervised for sample in judged] == [1, *(0 for _ in judged[1:])]


def test_the_loss_of_a_judged_span_is_that_of_training(letters: Tokenizer) -> None:
    """-log of the span's share among all that lie in the context; a window that is only scored loses nothing."""
    context = context_for(ANSWERS, letters, options={"max_answer_tokens": 3})
    (sample,) = samples(ANSWERS.encode(ASKED, 1, context, file="f"))
    values = np.random.default_rng(2).normal(size=(len(sample.tokens), 3)).astype(np.float32)
    first, stop = sample.columns["context_start"], sample.columns["context_stop"]
    wide = values.astype(np.float64)
    every = [wide[i, n] for i in range(first, stop) for n in range(3) if i + n < stop]
    place = sample.columns["start"], sample.columns["end"] - sample.columns["start"]

    assert sample_loss("joint_span", sample, values).total == pytest.approx(np.logaddexp.reduce(every) - wide[place])
    scored = Sample(sample.tokens, columns={**sample.columns, "only_scored": 1})
    assert sample_loss("joint_span", scored, values).count == 0


@pytest.mark.parametrize(
    ("recipe", "row", "options", "says"),
    [
        (ANSWERS, {**ASKED, "answers": [], "is_impossible": True}, {}, "E-DATA-008"),
        (
            ANSWERS,
            {**ASKED, "answers": [{"text": ASKED["context"], "answer_start": 0}]},
            {"max_answer_tokens": 2},
            "E-DATA-021",
        ),
        (QUESTIONS, {**ROW, "answers": [], "is_impossible": True}, {}, "E-DATA-008"),
        (QUESTIONS, {**ROW, "answers": [], "is_impossible": True}, {"unanswerable": True}, "E-DATA-008"),
        (QUESTIONS, {**ROW, "answers": [{"text": TEXT, "answer_start": 0}]}, {"context_tokens": 16}, "E-DATA-021"),
        (QUESTIONS, {**ROW, "question": "why? " * 300}, {}, "E-DATA-021"),
    ],
)
def test_R11_what_cannot_be_learned_is_told(
    recipe: Any, row: dict[str, Any], options: dict[str, Any], says: str, letters: Tokenizer, bytes_: Tokenizer
) -> None:
    """A row without an answer, an answer or a question that is too long: one finding, and no sample."""
    tokenizer = letters if recipe is ANSWERS else bytes_
    (found,) = recipe.encode(row, 1, context_for(recipe, tokenizer, max_tokens=256, options=options), file="f")

    assert isinstance(found, Finding)
    assert found.code == says


@pytest.mark.parametrize("roles", ["markers", "types"])
def test_acc_005_what_is_learned_is_what_a_server_prompts_with(bytes_: Tokenizer, roles: str) -> None:
    """
    The tokens up to the question are the server's prompt and none of them is learned, the rest is; with `loss_on: all`
    everything is while learning, and the question alone when judged.
    """
    context = context_for(QUESTIONS, bytes_, max_tokens=300, options={"roles": roles})
    (sample,) = samples(QUESTIONS.encode(ROW, 1, context, file="f"))
    format_ = task_format(QUESTIONS.task_file(context, {}))
    assert isinstance(format_, QuestionFormat)
    prompt = format_.pack(TEXT, (41, 43), bytes_).tokens
    learned = [i for i, target in enumerate(sample.targets) if target != IGNORE]
    options = {"roles": roles, "loss_on": "all"}
    (whole,) = samples(
        QUESTIONS.encode(ROW, 1, context_for(QUESTIONS, bytes_, max_tokens=300, options=options), file="f")
    )
    judging = context_for(QUESTIONS, bytes_, max_tokens=300, options=options, validating=True)
    (judged,) = samples(QUESTIONS.encode(ROW, 1, judging, file="f"))

    assert sample.tokens[: len(prompt)] == prompt
    assert learned == list(range(len(prompt) - 1, len(sample.tokens) - 1))
    assert sum(target != IGNORE for target in whole.targets) == len(whole.tokens) - 1
    assert judged.targets == sample.targets
    assert bool(sample.types) == (roles == "types")
    assert QUESTIONS.needs(context.options).token_types == (3 if roles == "types" else 0)


def test_numbers_of_written_questions(bytes_: Tokenizer) -> None:
    """What can't be read counts 0 for ROUGE-L, and is told as a share."""
    context = context_for(QUESTIONS, bytes_, max_tokens=300)
    told = QUESTIONS.judge({1: " How many sacks? :question", 2: " How many sacks?"}, {1: ROW, 2: ROW}, context)

    assert told == {"rouge_l": 0.5, "parsed": 0.5, "asking": 0.5, "written_answers": 2.0}
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert rouge_l("", "a") == 0.0
    assert proposal_recall([]) == 0.0


def test_numbers_of_proposed_answers(letters: Tokenizer) -> None:
    """
    Of three different answers to a text those count that are among its five likeliest spans, each once, whichever row
    asks for it. Inverse seen red: the first five spans in place of the likeliest.
    """
    said = ("aspirin", "it", "pain", "pain")
    rows = {
        line: {**ASKED, "answers": [{"text": text, "answer_start": ASKED["context"].index(text)}]}
        for line, text in enumerate(said, start=1)
    }
    context = context_for(ANSWERS, letters, options={"max_answer_tokens": 2}, validating=True)
    outputs = []
    for line, row in rows.items():
        (sample,) = samples(ANSWERS.encode(row, line, context, file="f"))
        values = np.full((len(sample.tokens), 2), -9.0, np.float32)
        values[7, 0] = 5.0  # [CLS] the aspirin of it , the pain [SEP]
        values[[3, 4, 6], 0] = values[3, 1] = 0.0  # of, it, the, of it
        outputs.append(Output(sample, values))
    told = ANSWERS.metrics(outputs, rows, context)

    assert told["answer_recall"] == pytest.approx(2 / 3)
    assert told["candidate_share"] > 0.99


@pytest.mark.parametrize(("side", "count", "within"), [("train", 2660, 14), ("val", 628, 0)])
def test_acc_006_fairytales_become_rows(shared_data: Callable[[str], Path], side: str, count: int, within: int) -> None:
    """Explicit questions whose answer stands in their sections, which are joined; what is left out is counted."""
    files = [shared_data(f"qa/fairytaleqa_{side}.jsonl"), shared_data(f"stories/fairytaleqa_stories_{side}.jsonl")]
    split = convert("fairytaleqa", *(file.read_bytes() for file in files))
    rows = json.loads(json.dumps(split.train))

    assert len(rows) == count
    assert split.dropped.get("questions whose answer is a part of a word", 0) == within
    assert len(rows) + sum(split.dropped.values()) == {"train": 5000, "val": 1025}[side]
    for row in rows:
        assert QUESTIONS.detect(row) == QUESTIONS.formats[0]
        assert QUESTIONS.check(row, QUESTIONS.formats[0], file="f", line=1) == []


def test_R11_fairytales_without_their_stories_are_told() -> None:
    """A missing file and a missing section, each in one sentence."""
    question = {"story": "a", "sections": ["2"], "question": "who?", "answers": ["x"], "explicit": "explicit"}
    documents = [json.dumps(item).encode() for item in (question, {"story": "a", "sections": ["x came"]})]
    with pytest.raises(ValueError, match=r"fairytaleqa is read from 2 files\. Given: 1"):
        convert("fairytaleqa", documents[0])
    with pytest.raises(ValueError, match=r"story 'a' has no sections \['2'\] in the second file"):
        convert("fairytaleqa", *documents)


def test_acc_005_both_kinds_are_learned_under_their_names(bytes_: Tokenizer) -> None:
    """
    A row of SQuAD 2.0 without an answer is learned from its plausible one, and prompted as a server does. Answers and
    plausible ones exclude each other, and both stand where they are said to.
    """
    plausible = {**ROW, "answers": [], "is_impossible": True, "plausible_answers": ROW["answers"]}
    context = context_for(QUESTIONS, bytes_, max_tokens=300, options={"unanswerable": True})
    format_ = QuestionFormat(unanswerable=True)
    asked = {**plausible, "plausible_answers": [{**ROW["answers"][0], "more": 1}]}
    del asked["context"]
    document = {"data": [{"paragraphs": [{"context": TEXT, "qas": [asked]}]}]}
    (read,) = read_squad(json.dumps(document).encode(), file="f") or ()

    assert QUESTIONS.task_file(context, {})["unanswerable"] is True
    for row, answerable in ((ROW, True), (plausible, False), (read, False)):
        assert QUESTIONS.check(row, QUESTIONS.detect(row) or "", file="f", line=1) == []  # type: ignore[arg-type]
        (sample,) = samples(QUESTIONS.encode(row, 1, context, file="f"))  # type: ignore[arg-type]
        prompt = format_.pack(TEXT, (41, 43), bytes_, answerable=answerable).tokens
        assert sample.tokens[: len(prompt)] == prompt
    for wrong, code, path in (
        ({**ROW, "plausible_answers": ROW["answers"]}, "E-DATA-008", "plausible_answers"),
        (
            {**plausible, "plausible_answers": [{"text": "12", "answer_start": 3}]},
            "E-DATA-041",
            "plausible_answers[0].answer_start",
        ),
    ):
        (finding,) = QUESTIONS.check(wrong, QUESTIONS.formats[0], file="f", line=1)
        assert (finding.code, finding.path) == (code, path)


def test_rows_are_checked_as_those_of_span_qa() -> None:
    """An answer that isn't where it is said to be is told with the place where it is."""
    row = {**ROW, "answers": [{"text": "12", "answer_start": 3}]}
    (found,) = QUESTIONS.check(row, QUESTIONS.formats[0], file="f", line=1)

    assert found.code == "E-DATA-041"
    assert f"It stands at {TEXT.index('12')}." in found.hint
