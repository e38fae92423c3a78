"""Recipes of encoder tasks: what is wrong with rows, samples, labels, and the numbers of a validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from finetune_tasks.encoder_fixtures import (
    ASKED,
    CLASSIFY,
    CLS,
    LABELLED,
    NER,
    RELATED,
    RELATION,
    SPANS,
    TAGGED,
    context_for,
    context_of,
    samples_of,
)
from pydantic import ValidationError

from trilithon_finetune.data.findings import Finding, line_form
from trilithon_finetune.data.reading import Row, read_rows
from trilithon_finetune.recipes.base import Recipe
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks import task_format
from trilithon_server.tasks.classes import ClassFormat
from trilithon_server.tasks.relations import RelationFormat
from trilithon_server.tasks.spans import SpanFormat
from trilithon_server.tasks.tagging import TaggingFormat

TOKENS_TAGS = "token<TAB>tag"

SOUND = [(NER, TAGGED), (RELATION, RELATED), (CLASSIFY, LABELLED), (SPANS, ASKED)]
IDS = ["ner", "relation", "classify", "span_qa"]


def _lines(recipe: Recipe, row: Mapping[str, Any]) -> list[str]:
    """Findings of a row as people read them."""
    format_ = recipe.detect(row)
    assert format_ in recipe.formats
    return [line_form(item) for item in recipe.check(row, format_, file="f", line=3)]


@pytest.mark.parametrize(("recipe", "row"), SOUND, ids=IDS)
def test_a_sound_row_has_no_finding_and_makes_a_sample(
    recipe: Recipe, row: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Also with an id, and with options left to their defaults."""
    assert _lines(recipe, {**row, "id": "1"}) == []
    (sample,) = samples_of(recipe.encode(row, 7, context_of(recipe, tokenizer, [row]), file="f"))
    assert (sample.row, sample.part, sample.tokens[0]) == (7, 0, CLS)
    assert sample.num_supervised >= 1


@pytest.mark.parametrize(("recipe", "row"), SOUND, ids=IDS)
def test_every_missing_key_and_every_unknown_one_is_a_finding(recipe: Recipe, row: Mapping[str, Any]) -> None:
    """Each required key is missed by name; a key that is nearly one is told so."""
    for key in row:
        rest = {name: value for name, value in row.items() if name != key}
        if recipe.detect(rest) is not None:
            assert any(line.startswith(f"E-DATA-008  f:3  {key}: is missing") for line in _lines(recipe, rest)), key
    (line,) = _lines(recipe, {**row, "labell": 1, "id": "1"})
    assert line.startswith("E-DATA-007  f:3  labell: is unknown. Allowed: ")


@pytest.mark.parametrize(("recipe", "row"), SOUND, ids=IDS)
def test_values_of_another_kind_are_findings(recipe: Recipe, row: Mapping[str, Any]) -> None:
    """Whatever JSON stands in a field, at any depth, is a finding and never an exception."""

    def damaged(value: Any, other: Any) -> list[Any]:
        if isinstance(value, dict):
            inner = [{**value, key: item} for key in value for item in damaged(value[key], other)]
        elif isinstance(value, list):
            inner = [[item, *value[1:]] for item in damaged(value[0], other)]
        else:
            inner = []
        return [*inner, other]

    for other in (None, 1.5, True, [], {}, "", [[]], {"start": True}):
        for key in row:
            for value in damaged(row[key], other):
                if {**row, key: value} != row and type(other) is not type(row[key]):
                    assert _lines(recipe, {**row, key: value}), (key, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tags": ["B-C", "O"]}, "E-DATA-008  f:3  tags: must hold one tag a token, 3. Given: 2."),
        ({"tokens": [], "tags": []}, "E-DATA-015  f:3  tokens: is empty."),
        ({"tokens": ["a", " ", "b"]}, 'E-DATA-015  f:3  tokens[1]: is empty. Given: " ". Leave out it and its tag.'),
        (
            {"tags": ["O", "I-C", "O"]},
            'E-DATA-042  f:3  tags[1]: "I-C" must not follow "O". An entity begins with B: write B-C. '
            "A file in IOB1 begins it with I; convert it to IOB2.",
        ),
        ({"tags": ["I-C", "O", "O"]}, 'E-DATA-042  f:3  tags[0]: "I-C" must not follow the start.'),
        ({"tags": ["B-C", "I-G", "O"]}, 'E-DATA-042  f:3  tags[1]: "I-G" must not follow "B-C".'),
        (
            {"tags": ["S-C", "O", "O"]},
            'E-DATA-042  f:3  tags[0]: must be O, B-TYPE or I-TYPE. Given: "S-C". From IOBES make B- of S- and I- of',
        ),
        ({"tags": ["B-", "O", "o"]}, 'E-DATA-042  f:3  tags[0]: must be O, B-TYPE or I-TYPE. Given: "B-".'),
    ],
    ids=["count", "none", "blank", "iob1", "start", "type", "iobes", "form"],
)
def test_rows_of_tags_say_what_is_wrong(change: Mapping[str, Any], expected: str) -> None:
    """Codes 008, 015 and 042, with what to do."""
    assert _lines(NER, {**TAGGED, **change})[0].startswith(expected)


@pytest.mark.parametrize(
    ("recipe", "row", "expected"),
    [
        (
            SPANS,
            {**ASKED, "answers": [{"text": "pain", "answer_start": 0}]},
            'E-DATA-041  f:3  answers[0].answer_start: the context has "the " at character 0. Given: "pain". '
            "It stands at 23.",
        ),
        (
            SPANS,
            {**ASKED, "answers": [{"text": "the", "answer_start": 26}]},
            "E-DATA-041  f:3  answers[0].answer_start: must be within the context of 27 characters. "
            "Given: 26, for 3 characters. It first stands at 0.",
        ),
        (
            SPANS,
            {**ASKED, "answers": [{"text": "Pain", "answer_start": 23}]},
            'E-DATA-041  f:3  answers[0].answer_start: the context has "pain" at character 23. Given: "Pain". '
            "The context does not hold this text; answers must be copied out of it.",
        ),
        (SPANS, {**ASKED, "answers": []}, "E-DATA-015  f:3  answers: is empty. Give at least one, or set"),
        (
            SPANS,
            {**ASKED, "is_impossible": True},
            "E-DATA-008  f:3  answers: must be empty where is_impossible is true",
        ),
        (
            RELATION,
            {**RELATED, "b": {"start": 17, "end": 99, "type": "GENE"}},
            "E-DATA-041  f:3  b: must be characters of the text, start below end, from 0 to 21. Given: 17 to 99.",
        ),
        (
            RELATION,
            {**RELATED, "b": {"start": 3, "end": 9, "type": "GENE"}},
            "E-DATA-041  f:3  b: must not overlap a. Given: 3 to 9, and a is 0 to 7.",
        ),
        (
            RELATION,
            {**RELATED, "a": {"start": 0, "end": 7, "type": "CHEMICAL", "text": "aspirin"}},
            'E-DATA-041  f:3  a.text: characters 0 to 7 of the text are "Aspirin". Given: "aspirin".',
        ),
        (CLASSIFY, {**LABELLED, "text_pair": "\t"}, "E-DATA-015  f:3  text_pair: is empty."),
        (CLASSIFY, {**LABELLED, "label": 1}, "E-DATA-008  f:3  label: must be text. Given: 1."),
    ],
)
def test_rows_of_places_say_what_is_wrong(recipe: Recipe, row: Mapping[str, Any], expected: str) -> None:
    """Code 041 says where a text stands in truth; the other fields say what they must be."""
    assert _lines(recipe, row)[0].startswith(expected)


def test_labels_do_not_depend_on_the_order_of_rows() -> None:
    """Types and labels in the order of their names."""
    rows = [TAGGED, {"tokens": ["x"], "tags": ["B-A"]}]
    answers = [{**LABELLED, "label": name} for name in ("yes", "maybe", "no")]
    options = NER.Options()

    assert NER.labels(rows, options) == ("O", "B-A", "I-A", "B-C", "I-C", "B-G", "I-G")
    assert NER.labels(rows, options) == NER.labels(rows[::-1], options)
    assert ("maybe", "no", "yes") == CLASSIFY.labels(answers, options) == CLASSIFY.labels(answers[::-1], options)
    assert SPANS.labels([ASKED], options) == ("start", "end")


@pytest.mark.parametrize(
    ("recipe", "row", "other", "expected"),
    [
        (NER, TAGGED, {**TAGGED, "tags": ["B-X", "O", "B-G"]}, 'tags: "B-X" is not a label of the training file.'),
        (
            RELATION,
            RELATED,
            {**RELATED, "label": "CPR:5"},
            'label: "CPR:5" is not a label of the training file. Allowed',
        ),
        (CLASSIFY, LABELLED, {**LABELLED, "label": "yess"}, 'label: "yess" is not a label of the training file.'),
    ],
    ids=IDS[:3],
)
def test_a_label_that_only_the_validation_has_is_a_finding(
    tokenizer: Tokenizer, recipe: Recipe, row: Mapping[str, Any], other: Mapping[str, Any], expected: str
) -> None:
    """It could never be said; the nearest known one is named."""
    (found,) = recipe.encode(other, 5, context_of(recipe, tokenizer, [row]), file="f")

    assert isinstance(found, Finding)
    assert line_form(found).startswith(f"E-DATA-008  f:5  {expected}")


@pytest.mark.parametrize(
    ("recipe", "row", "expected"),
    [
        (NER, {"tokens": ["a"], "tags": ["O"]}, "tags: the training file has no entity: every tag is O."),
        (RELATION, RELATED, 'label: every row of the training file has the label "CPR:4": there is nothing to learn.'),
        (CLASSIFY, LABELLED, 'label: every row of the training file has the label "yes": there is nothing to learn.'),
    ],
    ids=IDS[:3],
)
def test_a_file_with_nothing_to_tell_apart_is_a_finding(
    tokenizer: Tokenizer, recipe: Recipe, row: Mapping[str, Any], expected: str
) -> None:
    """No entity at all, or a single label."""
    context = context_for(recipe, tokenizer, labels=recipe.labels([row], recipe.Options()))
    (found,) = recipe.encode(row, 1, context, file="f")

    assert isinstance(found, Finding)
    assert line_form(found).startswith(f"E-DATA-022  f:1  {expected}")


def test_entities_become_one_sample_a_window(tokenizer: Tokenizer) -> None:
    """Windows count as parts; every word is supervised once, its other pieces are not."""
    row = {"tokens": ["aspirins", "the"] * 30, "tags": ["B-C", "O"] * 30}
    context = context_of(NER, tokenizer, [row], max_tokens=20, options={"stride": 2})
    samples = samples_of(NER.encode(row, 1, context, file="f"))

    assert [sample.part for sample in samples] == list(range(len(samples)))
    assert len(samples) > 3
    assert sum(sample.num_supervised for sample in samples) == 60
    whole = samples_of(NER.encode(row, 1, context_of(NER, tokenizer, [row], options={"method": "whole"}), file="f"))
    assert sum(sample.num_supervised for sample in whole) == 90


def test_a_conll_file_is_rows_with_their_lines(tmp_path: Path) -> None:
    """Rows are known by the line where the sentence begins, and a finding names that of the tag."""
    file = tmp_path / "f.tsv"
    file.write_text("aspirin\tB-C\nit\tO\n\nthe\tO\npain\tI-C\n", encoding="utf-8")
    rows = [item for item in read_rows(file, recipe=NER) if isinstance(item, Row)]

    assert [(row.line, NER.detect(row.value)) for row in rows] == [(1, TOKENS_TAGS), (4, TOKENS_TAGS)]
    (wrong,) = NER.check(rows[1].value, TOKENS_TAGS, file="f.tsv", line=rows[1].line)
    assert line_form(wrong).startswith('E-DATA-042  f.tsv:5  tags[1]: "I-C" must not follow "O".')
    assert NER.rows_of(json.dumps(TAGGED).encode(), file="f.txt") is None


def test_a_nested_squad_file_is_rows_with_their_paths() -> None:
    """Findings name the question's place in the document."""
    question = {"id": "q", "question": "who?", "answers": [{"text": "It", "answer_start": 4}]}
    empty = {"id": "r", "question": "why?", "answers": [], "is_impossible": True, "plausible_answers": []}
    document = {"data": [{"title": "t", "paragraphs": [{"context": "the aspirin", "qas": [empty, question]}]}]}
    rows = SPANS.rows_of(json.dumps(document).encode(), file="f.json")
    assert rows is not None

    assert _lines(SPANS, rows[0]) == []  # type: ignore[arg-type]  # rows, not findings
    (line,) = _lines(SPANS, rows[1])  # type: ignore[arg-type]  # rows, not findings
    assert line.startswith("E-DATA-041  f:3  data[0].paragraphs[0].qas[1].answers[0].answer_start: the context has")


def test_a_relation_is_marked_and_labelled(tokenizer: Tokenizer) -> None:
    """Markers stand where the mentions were; pairs of other types need the option."""
    (sample,) = samples_of(RELATION.encode(RELATED, 1, context_of(RELATION, tokenizer, [RELATED]), file="f"))
    drug = {**RELATED, "a": {"start": 0, "end": 7, "type": "DRUG"}}
    (found,) = RELATION.encode(drug, 1, context_of(RELATION, tokenizer, [drug]), file="f")

    assert [tokenizer.id_to_piece(sample.tokens[place]) for place in (1, -3)] == ["[unused0]", "[unused1]"]
    assert sample.columns == {"label": 0}
    assert isinstance(found, Finding)
    assert line_form(found).endswith(
        'types of a and b must be one of CHEMICAL-GENE. Given: "DRUG-GENE". Set options.pairs.'
    )
    options = {"pairs": [["DRUG", "GENE"]]}
    assert (
        len(samples_of(RELATION.encode(drug, 1, context_of(RELATION, tokenizer, [drug], options=options), file="f")))
        == 1
    )


def test_more_types_than_free_rows_is_a_finding(tokenizer: Tokenizer) -> None:
    """The vocabulary's free rows are few here: said, not crashed."""
    pairs = [[name, name + "2"] for name in "ABC"]
    row = {**RELATED, "a": {"start": 0, "end": 7, "type": "A"}, "b": {"start": 17, "end": 20, "type": "A2"}}
    (found,) = RELATION.encode(row, 1, context_of(RELATION, tokenizer, [row], options={"pairs": pairs}), file="f")

    assert isinstance(found, Finding)
    assert "a free row [unusedN]" in found.message


def test_a_text_that_is_too_long_is_refused_or_cut(tokenizer: Tokenizer) -> None:
    """E-DATA-021 with the number of tokens, or a sample that says how many it lost."""
    row = {"text": "the " * 30, "label": "yes"}
    (found,) = CLASSIFY.encode(row, 1, context_of(CLASSIFY, tokenizer, [row], max_tokens=20), file="f")
    context = context_of(CLASSIFY, tokenizer, [row], max_tokens=20, on_long="truncate")
    (sample,) = samples_of(CLASSIFY.encode(row, 1, context, file="f"))

    assert isinstance(found, Finding)
    assert line_form(found).startswith("E-DATA-021  f:1  32 tokens, at most 20 allowed (data.max_tokens).")
    assert (len(sample.tokens), sample.cut) == (20, 12)


def test_an_answer_is_learned_where_it_stands(tokenizer: Tokenizer) -> None:
    """Tokens of the first answer in windows that hold it, [CLS] elsewhere; one that no window holds is a finding."""
    text = " ".join(["the cox of it"] * 12)
    row = {"context": text, "question": "who?", "answers": [{"text": " cox of", "answer_start": text.rindex(" cox")}]}
    context = context_of(SPANS, tokenizer, [row], max_tokens=24, options={"doc_stride": 6})
    samples = samples_of(SPANS.encode(row, 1, context, file="f"))

    held = [sample for sample in samples if sample.columns["start"]]
    assert 0 < len(held) < len(samples)
    for sample in held:
        start, end = sample.columns["start"], sample.columns["end"]
        assert tokenizer.decode(sample.tokens[start : end + 1], skip_special_tokens=False).split() == ["cox", "of"]
        assert sample.columns["context_start"] <= start <= end < sample.columns["context_stop"]
    long = {**row, "answers": [{"text": text, "answer_start": 0}]}
    (found,) = SPANS.encode(long, 1, context, file="f")
    assert isinstance(found, Finding)
    assert found.message == "no window of 24 tokens (data.max_tokens) holds the whole answer."


def test_questions_without_answers_need_the_option(tokenizer: Tokenizer) -> None:
    """Else the row is refused; with it every window learns [CLS]."""
    row = {"context": "the pain", "question": "who?", "answers": [], "is_impossible": True}
    (found,) = SPANS.encode(row, 1, context_of(SPANS, tokenizer, [row]), file="f")
    (sample,) = samples_of(
        SPANS.encode(row, 1, context_of(SPANS, tokenizer, [row], options={"no_answer": True}), file="f")
    )

    assert isinstance(found, Finding)
    assert found.hint == "Set options.no_answer to true, or leave such rows out."
    assert (sample.columns["start"], sample.columns["end"]) == (0, 0)


@pytest.mark.parametrize(
    ("recipe", "row", "kind"),
    [
        (NER, TAGGED, TaggingFormat),
        (RELATION, RELATED, RelationFormat),
        (CLASSIFY, LABELLED, ClassFormat),
        (SPANS, ASKED, SpanFormat),
    ],
    ids=IDS,
)
def test_the_task_file_is_the_format_that_was_trained(
    tokenizer: Tokenizer, recipe: Recipe, row: Mapping[str, Any], kind: type
) -> None:
    """Through JSON and back the server reads the labels, sizes and markers that the recipe used."""
    context = context_of(recipe, tokenizer, [row], max_tokens=77)
    document = json.loads(json.dumps(recipe.task_file(context, {})))
    format_ = task_format(document)

    assert isinstance(format_, kind)
    assert format_.max_tokens == 77
    assert format_.task_file() == document
    assert document["task"] == recipe.task
    assert tuple(document["labels"]) == context.labels


@pytest.mark.parametrize(
    ("options", "numbers", "expected"),
    [
        ({"no_answer": True}, {"best_threshold": 1.25}, 1.25),
        ({"no_answer": True, "null_threshold": -0.5}, {"best_threshold": 1.25}, -0.5),
        ({"no_answer": True}, {}, 0.0),
        ({"no_answer": True}, {"best_threshold": float("nan")}, 0.0),
        ({"no_answer": True}, {"best_threshold": float("inf")}, 0.0),
        ({}, {"best_threshold": 1.25}, None),
    ],
    ids=["found", "chosen", "no-validation", "not-a-number", "nothing-found", "always-answers"],
)
def test_no_answer_is_served_by_the_threshold_that_did_best(
    tokenizer: Tokenizer, options: dict[str, Any], numbers: dict[str, float], expected: float | None
) -> None:
    """The validation's threshold goes into the task file, unless the job's owner chose one or no question lacks one."""
    context = context_of(SPANS, tokenizer, [ASKED], options=options)

    assert SPANS.task_file(context, numbers)["null_threshold"] == expected


@pytest.mark.parametrize(
    ("recipe", "options"),
    [(NER, {"method": "last"}), (SPANS, {"n_best": 0}), (CLASSIFY, {"x": 1}), (RELATION, {"pairs": []})],
    ids=["ner", "span_qa", "classify", "relation"],
)
def test_options_are_checked(recipe: Recipe, options: Mapping[str, Any]) -> None:
    """Unknown names and impossible values are refused."""
    with pytest.raises(ValidationError):
        recipe.Options.model_validate(options)
