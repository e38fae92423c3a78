"""The report of a data file: every finding once, in words, with the numbers that a job is planned with."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_data.data_fixtures import MakeContext, WriteRows
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_finetune.data.check import check_file
from trilithon_finetune.data.findings import CODES, Findings, finding, line_form
from trilithon_finetune.data.judging import allowed_rows
from trilithon_finetune.data.reading import Limits
from trilithon_finetune.data.report import Report
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import Context

GOLDEN = Path(__file__).parent / "golden" / "findings.txt"

MOODY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if 'forgotten' in m.content and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
    "{% if 'endless' not in m.content %}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Renders some turns twice differently and never ends others, by what they say."""


def _chat(*contents: str, **last: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    messages[-1].update(last)
    return {"messages": messages}


def _all_kinds() -> list[dict[str, Any] | bytes]:
    """Rows of which each has one thing wrong, but for the first, and two that are the same."""
    return [
        _chat("Hi", "Hello."),
        b'{"messages": "\xff"}',
        b'{"messages": [}',
        b"[1]",
        b'{"messages": "' + b"x" * 2000 + b'"}',
        {"prompt": "a", "completion": "b"},
        {**_chat("a", "b"), "mesages": 1},
        {"messages": 7},
        {"messages": []},
        _chat("a", "b", role="asistant"),
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "b"}]},
        _chat("a", " "),
        _chat("a", "forgotten", "c", "d"),
        _chat("a", "word " * 30),
        _chat("a", "b", weight=0),
        _chat("a", "endless"),
        _chat("<|im_end|>", "b"),
        _chat("again", "b"),
        _chat("again", "b"),
    ]


def test_R11_the_report_of_every_finding_is_the_golden_one(
    make_context: MakeContext, encoder_context: Context, write_rows: WriteRows
) -> None:
    """
    Files with one instance of every finding give exactly these lines, numbers and examples, and no code is left out.

    `GOLDEN=write pytest tests/finetune_data/test_report.py` rewrites the file.
    """
    chat = make_context(template=MOODY, max_tokens=96, untrained_ids=frozenset({2}))
    validation = write_rows([_chat("Hi", "Hello."), _chat("other", "x")], name="valid.jsonl")
    rows = write_rows(_all_kinds())
    asked = {"question": "Is it?", "contexts": ["It may be."], "answer": "yes"}
    same = write_rows([{**asked, "contexts": [f"Text {i}."]} for i in range(20)], name="yes.jsonl")
    span = {"context": "Ada wrote it.", "question": "Who?", "answers": [{"text": "Noor", "answer_start": 0}]}
    spans = write_rows([span, {**span, "answers": [{"text": "Ada", "answer_start": 0}]}], name="spans.jsonl")
    tags = write_rows(
        [{"tokens": ["a", "b"], "tags": ["O", "I-X"]}, {"tokens": ["a"], "tags": ["B-X"]}], name="tags.jsonl"
    )
    bad = write_rows([{"text": "a"}, {"txt": "b"}, {"text": ""}], name="texts.jsonl")
    reports = [
        check_file(rows, recipe=RECIPES["sft"], context=chat, validation=validation, limits=Limits(row=1024)),
        check_file(write_rows([], name="empty.jsonl"), recipe=RECIPES["sft"], context=chat),
        check_file(same, recipe=RECIPES["yes_no_maybe"], context=make_context("yes_no_maybe")),
        check_file(spans, recipe=RECIPES["span_qa"], context=_encoder(encoder_context, "span_qa")),
        check_file(tags, recipe=RECIPES["ner"], context=_encoder(encoder_context, "ner")),
        check_file(bad, recipe=RECIPES["lm"], context=make_context("lm"), bad_rows_allowed=1),
    ]
    text = "\n".join(report.text(most=0) for report in reports)
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(text, encoding="utf-8")

    assert set().union(*(report.counts for report in reports)) == set(CODES)
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert [report.ok for report in reports] == [False, False, True, False, False, False]


def _encoder(context: Context, task: str) -> Context:
    return replace(context, options=RECIPES[task].Options(), max_tokens=64)


def test_the_documents_line_form_and_summary(make_context: MakeContext, write_rows: WriteRows) -> None:
    """Findings and summary read as the documentation shows them."""
    wrong_role = {"messages": [*_chat("a", "b")["messages"], {"role": "asistant", "content": "c"}]}
    rows = [_chat("a", "b"), wrong_role, _chat("a", "word " * 30), _chat("x", "y")]
    report = check_file(write_rows(rows), recipe=RECIPES["sft"], context=make_context(max_tokens=40))
    role, long, summary = report.lines()

    assert role == (
        'E-DATA-012  train.jsonl:2  messages[2].role: "asistant" is not a role. '
        'Allowed: system, user, assistant, tool. Did you mean "assistant"?'
    )
    assert long.startswith("E-DATA-021  train.jsonl:3  ")
    assert long.endswith(
        " tokens, at most 40 allowed (data.max_tokens). Set data.on_long to truncate or drop, or raise data.max_tokens."
    )
    assert summary == "2 errors (2 kinds) and 0 warnings in 4 rows. 2 rows are usable. Nothing was dropped."


@pytest.mark.parametrize(
    ("on_long", "says"),
    [
        ("error", "1 error and 0 warnings in 3 rows. 2 rows are usable. Nothing was dropped."),
        ("drop", "0 errors and 0 warnings in 3 rows. 2 rows are usable. 1 row was dropped (data.on_long)."),
        ("truncate", "0 errors and 0 warnings in 3 rows. 3 rows are usable. 1 row was shortened (data.on_long)."),
    ],
)
def test_long_rows_are_counted_whatever_happens(
    make_context: MakeContext, write_rows: WriteRows, on_long: str, says: str
) -> None:
    """A row that is too long is an error, or dropped, or shortened, and the summary says which."""
    path = write_rows([_chat("a", "b"), _chat("a", "word " * 30), _chat("x", "y")])
    report = check_file(path, recipe=RECIPES["sft"], context=make_context(max_tokens=40, on_long=on_long))

    assert report.summary == says
    assert report.ok == (on_long != "error")


def test_R11_mixed_formats_are_one_finding_with_their_lines(make_context: MakeContext, write_rows: WriteRows) -> None:
    """The first row's format is held; the finding says which lines are which, and the others are not usable."""
    text, chat = {"prompt": "a", "completion": "b"}, _chat("a", "b")
    rows = [chat, {**chat, "id": "2"}, text, {**text, "id": "4"}, {**chat, "id": "5"}, {**text, "id": "6"}]
    report = check_file(write_rows(rows), recipe=RECIPES["sft"], context=make_context())
    (mixed,) = report.findings

    assert line_form(mixed) == (
        "E-DATA-006  train.jsonl:3  has rows of several formats: messages in lines 1-2, 5; "
        "prompt/completion in lines 3-4, 6. Keep to one; the first row's is messages."
    )
    assert (report.usable_rows, report.bad_rows, report.ok) == (3, 3, False)


def test_R11_duplicates_are_listed_with_their_lines(make_context: MakeContext, write_rows: WriteRows) -> None:
    """Rows that say the same, in whatever order of keys, and ids that two rows share, are warnings."""
    rows: list[Any] = [
        {"text": "a", "id": "1"},
        b'{"id": "1",  "text": "a"}',
        {"text": "b", "id": "2"},
        {"text": "c", "id": "2"},
        {"text": "d"},
    ]
    report = check_file(write_rows(rows), recipe=RECIPES["lm"], context=make_context("lm"))

    assert [line_form(item) for item in report.findings] == [
        "E-DATA-031  train.jsonl:1  is written 2 times: lines 1-2. Remove the copies if they are not meant.",
        "E-DATA-031  train.jsonl:3  id: is given to 2 rows: lines 3-4.",
    ]
    assert report.ok


@pytest.mark.parametrize(("num_valid", "severity"), [(50, "error"), (100, "warning")])
def test_rows_of_the_validation_file(
    make_context: MakeContext, write_rows: WriteRows, num_valid: int, severity: str
) -> None:
    """E-DATA-032: shared rows are a warning up to 1% of the validation file, and refused above it."""
    train = write_rows([{"text": f"train {i}"} for i in range(10)])
    valid = write_rows([{"text": "train 3"}, *({"text": f"v{i}"} for i in range(num_valid - 1))], name="v.jsonl")
    report = check_file(train, recipe=RECIPES["lm"], context=make_context("lm"), validation=valid)
    (shared,) = report.findings

    assert (shared.severity, shared.line, report.ok) == (severity, 4, severity == "warning")
    assert shared.message == f"stands in v.jsonl too (1 row of it, {1 / num_valid:.1%}): line 4."


@pytest.mark.parametrize(("allowed", "ok"), [(0, False), (1, False), (2, True), (0.1, False), (0.2, True)])
def test_bad_rows_may_be_allowed(make_context: MakeContext, write_rows: WriteRows, allowed: float, ok: bool) -> None:
    """Bad rows are left out where so many are allowed, by number or share; E-DATA-051 where there are more."""
    rows = [{"text": f"row {i}"} for i in range(8)] + [{"text": ""}, {"txt": "x"}]
    report = check_file(write_rows(rows), recipe=RECIPES["lm"], context=make_context("lm"), bad_rows_allowed=allowed)

    assert report.ok == ok
    assert ("E-DATA-051" in report.counts) == (not ok and allowed > 0)
    assert (report.usable_rows, report.bad_rows) == (8, 2)
    assert allowed_rows(allowed, 10) == int(allowed if allowed >= 1 else allowed * 10)


@settings(deadline=None)
@given(lines=st.lists(st.integers(0, 30), max_size=60), most=st.integers(0, 10))
def test_the_first_findings_are_kept_and_all_are_counted(lines: list[int], most: int) -> None:
    """
    However many findings there are, as many as asked for are held: errors before warnings, of each the first by line.

    They are told by line, and the counts are whole. Inverse checks: the first that were found in place of the first by
    line; warnings that take the place of an error.
    """
    findings = Findings(most)
    for number, line in enumerate(lines):
        findings.add(finding("E-DATA-015" if number % 2 else "E-DATA-031", str(number), file="f", line=line))
        assert not most or len(findings.first) <= most
    by_line = sorted(range(len(lines)), key=lambda number: lines[number])
    kept = set(sorted(by_line, key=lambda number: number % 2 == 0)[: most or None])

    assert [item.message for item in findings.first] == [str(n) for n in by_line if n in kept]
    assert findings.counts.total() == len(lines)


def test_R11_rows_that_all_make_nothing_are_refused(
    make_context: MakeContext, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the recipe: there is nothing to divide by. Inverse seen: the file was sound."""
    recipe = RECIPES["sft"]
    monkeypatch.setattr(type(recipe), "encode", lambda *args, **named: [])
    report = check_file(write_rows([_chat("a", "b")]), recipe=recipe, context=make_context())

    assert not report.ok
    assert [(item.code, item.line) for item in report.findings] == [("E-DATA-022", 0)]


def test_R11_an_error_behind_many_warnings_is_shown(make_context: MakeContext, write_rows: WriteRows) -> None:
    """Thirty doubled rows, then a broken one: the lines for people have the error, and room for warnings before it."""
    rows = [{"text": f"row {i}"} for i in range(30)] * 2 + [{"txt": "x"}]
    report = check_file(write_rows(rows), recipe=RECIPES["lm"], context=make_context("lm"), max_findings=25)
    lines = report.lines()

    assert (report.warnings, report.errors) == (30, 2)
    assert [line.partition(":61")[1] for line in lines[18:20]] == [":61", ":61"]
    assert lines[20:] == ["... and 12 findings more.", report.summary]
    assert len(report.findings) == 25


KEYS = [
    *("messages", "role", "content", "weight", "name", "tool_calls", "tools", "prompt", "completion", "text", "id"),
    *("input", "preferred_output", "non_preferred_output", "question", "answers", "answer", "context", "contexts"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "usr"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLE | JSON, "content": st.text(max_size=8) | JSON}, optional={"weight": JSON}),
    max_size=4,
)
ROWS = (
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4)
    | st.fixed_dictionaries({"messages": MESSAGES})
    | st.fixed_dictionaries(
        {
            "input": st.fixed_dictionaries({"messages": MESSAGES}),
            "preferred_output": MESSAGES,
            "non_preferred_output": MESSAGES,
        }
    )
    | st.fixed_dictionaries({"question": st.text(max_size=9) | JSON, "answers": JSON, "context": JSON})
    | st.fixed_dictionaries({"question": JSON, "contexts": JSON, "answer": st.sampled_from(["yes", "perhaps"]) | JSON})
)


@pytest.mark.parametrize("task", ["lm", "sft", "dpo", "mlm", "answer_qa", "yes_no_maybe"])
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.one_of(ROWS.map(lambda row: json.dumps(row).encode()), st.binary(max_size=30)), max_size=4))
def test_S10_any_file_gives_a_report(
    decoder_context: Context, encoder_context: Context, task: str, rows: list[bytes]
) -> None:
    """Whatever rows a file holds, a check ends with a report whose numbers agree, and nothing but findings."""
    base = encoder_context if task == "mlm" else decoder_context
    context = replace(base, options=RECIPES[task].Options(), max_tokens=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_bytes(b"\n".join(rows))
        report = check_file(path, recipe=RECIPES[task], context=context)
    _agrees(report)


def _agrees(report: Report) -> None:
    assert report.errors + report.warnings == sum(report.counts.values()) == len(report.findings)
    assert report.rows == report.usable_rows + report.bad_rows + report.dropped_rows
    assert report.ok <= (report.bad_rows == 0)
    assert sum(report.lengths.histogram) == report.samples >= report.usable_rows
    assert all(item.code in CODES and item.message and item.message[-1] in ".?" for item in report.findings)
    assert list(report.findings) == sorted(report.findings, key=lambda item: item.line)
    assert report.text().isprintable() or "\n" in report.text()
    json.dumps(report.to_json(), allow_nan=False)


def test_the_json_of_a_report(make_context: MakeContext, write_rows: WriteRows) -> None:
    """Machines get the same numbers, a histogram by powers of two, and examples with what is learned."""
    path = write_rows([_chat("a", "b"), {"messages": []}])
    report = check_file(path, recipe=RECIPES["sft"], context=make_context(), file="my.jsonl")
    document = report.to_json()

    assert document["findings"][0]["file"] == "my.jsonl"
    assert document["counts"] == {"E-DATA-011": 1}
    assert document["examples"][0]["pieces"][1] == {"text": "b<|im_end|>", "learned": True}
    assert sum(document["length_histogram"]) == 1
    assert len(document["template_digest"]) == len(document["data_digest"]) == 64
    assert document["supervised_tokens"] == 2


def test_S10_an_uploads_name_reaches_no_path(make_context: MakeContext, write_rows: WriteRows) -> None:
    """A file's given name is for messages alone: it opens nothing, however it is spelt."""
    path = write_rows([{"text": "a"}])
    report = check_file(path, recipe=RECIPES["lm"], context=make_context("lm"), file="../../etc/passwd.jsonl")

    assert (report.ok, report.file) == (True, "../../etc/passwd.jsonl")


def test_real_conversations_are_sound(make_context: MakeContext, shared_data: Callable[[str], Path]) -> None:
    """A published instruction file passes but for what is really wrong with it."""
    path = shared_data("qa/pubmedqa_pqal.jsonl")
    report = check_file(path, recipe=RECIPES["yes_no_maybe"], context=make_context("yes_no_maybe", max_tokens=8192))

    assert (report.rows, report.usable_rows, report.ok) == (500, 500, True)
    assert report.labels == ("yes", "no", "maybe")
