"""Comment trees as rows: nothing held out is trained on, a turn is learned once, and a broken line has its place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from finetune_tasks.comment_dumps import comment, dump, earlier
from finetune_tasks.encoder_fixtures import context_for
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import write_bpe_tokenizer

from trilithon.cli import main
from trilithon_finetune.converters import MAX_FINDINGS, convert
from trilithon_finetune.converters.pushshift import pushshift_rows
from trilithon_finetune.data.findings import line_form
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import IGNORE, Sample
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer

Row = Mapping[str, Any]

FAULTS: tuple[dict[str, Any], ...] = (
    {"body": "look at https://example.org/page now"},
    {"body": "as [1] has it"},
    {"body": "this is GREAT news"},
    {"score": -99},
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE."""
    path = tmp_path_factory.mktemp("letters")
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    return load_tokenizer(path)


def learned(rows: Iterable[Row], tokenizer: Tokenizer, *, validating: bool = False, **options: Any) -> list[str]:
    """What the recipe learns of the rows: the runs of tokens that count, as texts."""
    recipe = RECIPES["dialogue"]
    context = context_for(
        recipe, tokenizer, max_tokens=2000, validating=validating, options={"conversation_tokens": 1000, **options}
    )
    runs: list[list[int]] = []
    for line, row in enumerate(rows, start=1):
        (sample,) = recipe.encode(row, line, context, file="f")
        assert isinstance(sample, Sample)
        for before, target in zip((IGNORE, *sample.targets), sample.targets, strict=False):
            if target != IGNORE:
                if before == IGNORE:
                    runs.append([])
                runs[-1].append(target)
    return [tokenizer.decode(run, skip_special_tokens=False).strip() for run in runs]


def submissions_of(conversations: Iterable[Iterable[Row]], known: Mapping[str, str]) -> set[str]:
    return {known[turn["text"]] for conversation in conversations for turn in conversation}


def known_texts(comments: Iterable[Row]) -> dict[str, str]:
    """Submission by text."""
    return {item["body"]: item["link_id"].removeprefix("t3_") for item in comments}


def test_acc_D02_a_late_answer_to_an_old_submission_has_no_held_out_references() -> None:
    """
    The first submission goes on long after the last one, which is held out: what ann says then is learned with her
    older conversations as references, without the held-out one, while that is judged with hers of the first submission.
    Dea, who was met in the held-out one alone, is nobody's to learn. Inverse seen: references chosen by time alone.
    """
    comments = [
        comment(10, None, "a", "bob"),
        comment(11, 10, "a", "ann"),
        *(
            comment(10 * i + j, 10 * i if j else None, f"s{i}", "ann" if j else "eve")
            for i in (2, 3, 4)
            for j in (0, 1)
        ),
        comment(100, None, "e", "dea"),
        comment(101, 100, "e", "ann"),
        comment(102, 101, "e", "dea"),
        comment(1000, None, "a", "fay"),
        comment(1001, 1000, "a", "ann"),
        comment(1002, 1001, "a", "dea"),
    ]
    dropped: Counter[str] = Counter()
    train, dev = pushshift_rows(dump(comments), dropped)
    known = known_texts(comments)
    (late,) = (row for row in train if row["ts"] == 1001)
    (judged,) = dev

    assert submissions_of(late["refs"], known) == {"s2", "s3", "s4"}
    assert submissions_of([judged["target"]], known) == {"e"}
    assert submissions_of(judged["refs"], known) == {"a", "s2", "s3", "s4"}
    assert "e" not in submissions_of([turns for row in train for turns in (row["target"], *row["refs"])], known)
    assert not [row for row in train if row["ts"] == 1002]


TREES = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 7),
        st.sampled_from(["ann", "bob", "cem"]),
        st.none() | st.sampled_from([{"score": -99}, {"brackets": True}]),
    ),
    min_size=30,
    max_size=60,
)


@given(TREES)
def test_acc_D02_sides_share_nothing_and_a_turn_is_learned_once(made: list[tuple[int, int, str, Any]]) -> None:
    """
    Whatever trees, one submission after another, and late answers to the first ones behind them all: rows to train on,
    with their references, and what is judged are of different submissions; each turn counts in one row at most, and
    none that the filters refuse; a row ends with a turn that counts.

    Inverse seen: weights left out; filters that look at the last turn alone; turns that are learned wherever they
    stand; references chosen by time alone in some runs (the case above sees them in each).
    """
    comments: list[dict[str, Any]] = []
    members: dict[str, list[int]] = {}
    faulty = set()
    for number, (late, parent, author, fault) in enumerate(made):
        submission = f"s{number // 6 if number < 0.75 * len(made) else late}"
        known = members.setdefault(submission, [])
        line = comment(number, known[-parent:][0] if known and parent else None, submission, author)
        if fault:
            line |= {"body": f"[words] of number {number}"} if "brackets" in fault else fault
            faulty.add(line["body"])
        comments.append(line)
        known.append(number)
    train, dev = pushshift_rows(dump(comments), Counter())
    texts = known_texts(comments)
    counted = [
        turn["text"]
        for row in (*train, *dev)
        for turn in row["target"]
        if turn["author"] == "u1" and turn.get("weight", 1)
    ]

    taught = submissions_of([turns for row in train for turns in (row["target"], *row["refs"])], texts)
    assert taught.isdisjoint(submissions_of([row["target"] for row in dev], texts))
    assert len(counted) == len(set(counted))
    assert faulty.isdisjoint(counted)
    assert all(row["target"][-1]["text"] in counted for row in (*train, *dev))
    assert not [turn for row in (*train, *dev) for turns in row["refs"] for turn in turns if "weight" in turn]


@pytest.mark.parametrize("fault", FAULTS, ids=["address", "brackets", "capitals", "score"])
def test_acc_D03_what_the_filters_refuse_is_never_learned(fault: dict[str, Any], letters: Tokenizer) -> None:
    """
    Ann answers with a fault, and goes on in two conversations: the recipe learns what she says there, once each, and
    not the first answer, which stands in both as it is. Inverse seen: filters that look at the last turn alone.
    """
    second = [
        comment(10, None, "s1", "cem"),
        comment(11, 10, "s1", "ann", **fault),
        comment(12, 11, "s1", "cem"),
        comment(13, 12, "s1", "ann"),
        comment(14, 13, "s1", "cem"),
        comment(15, 12, "s1", "ann"),
    ]
    dropped: Counter[str] = Counter()
    train, dev = pushshift_rows(dump([*earlier(), *second]), dropped)

    assert learned([*train, *dev], letters) == ["words of number 13", "words of number 15"]
    assert [turn.get("weight") for turn in train[0]["target"]] == [None, 0, None, None]
    assert len(train[1]["target"]) == 4
    assert (
        sum(count for reason, count in dropped.items() if reason.startswith("turns ") and "learned" not in reason) == 5
    )


def test_acc_D03_turns_that_conversations_share_are_learned_in_one_of_them(letters: Tokenizer) -> None:
    """
    Two conversations part after ann's first answer: the longer one teaches both of her turns, the other one the one
    that it adds, and who has nothing to add has no row. Inverse seen: turns that are learned wherever they stand.
    """
    second = [
        comment(10, None, "s1", "cem"),
        comment(11, 10, "s1", "ann"),
        comment(12, 11, "s1", "cem"),
        comment(13, 12, "s1", "ann"),
        comment(14, 13, "s1", "cem"),
        comment(15, 12, "s1", "ann"),
        comment(16, 11, "s1", "dea"),
    ]
    dropped: Counter[str] = Counter()
    train, _ = pushshift_rows(dump([*earlier(), *second]), dropped)

    assert learned(train, letters) == [f"words of number {number}" for number in (11, 13, 15)]
    assert [row["ts"] for row in train] == [13, 15]
    assert dropped["turns that are learned in another conversation"] == 2


ROW = {
    "actor": "me",
    "target": [
        {"author": "you", "text": "tea?"},
        {"author": "me", "text": "always"},
        {"author": "you", "text": "now?"},
        {"author": "me", "text": "not now", "weight": 0},
        {"author": "me", "text": "later", "weight": 1},
        {"author": "you", "text": "when?"},
        {"author": "me", "text": "at five", "weight": 0},
    ],
}


def test_R11_turns_of_weight_0_are_not_learned(letters: Tokenizer) -> None:
    """
    The conversation ends with the last turn that is learned, which is the one that is judged; where older turns find no
    room, each weight stays with its turn. Inverse seen: weights that are not looked at; weights counted from the front.
    """
    assert RECIPES["dialogue"].check(ROW, "actor/target/refs", file="f", line=1) == []
    assert learned([ROW], letters) == ["always", "later"]
    assert learned([ROW], letters, validating=True) == ["later"]
    assert learned([ROW], letters, conversation_tokens=24) == ["later"]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"author": "me", "text": "a", "weight": 2}], "E-DATA-008  f:3  target[0].weight: must be 0 or 1. Given: 2."),
        ([{"author": "me", "text": "a", "weight": True}], "target[0].weight: must be 0 or 1. Given: true."),
        ([{"author": "me", "text": "a", "weight": 0}], 'every turn of the actor "me" has the weight 0, so there is'),
        (
            [{"author": "you", "text": "a", "weight": 0}, {"author": "me", "text": "b"}],
            "E-DATA-007  f:3  target[0].weight: is unknown. Allowed: author, text.",
        ),
    ],
)
def test_R11_a_weight_that_says_nothing_is_a_finding(turns: list[Row], expected: str) -> None:
    """Another number, a truth value, nothing left to learn, and the weight of somebody else's turn."""
    row = {"actor": "me", "target": turns}
    found = RECIPES["dialogue"].check(row, "actor/target/refs", file="f", line=3)

    (line,) = map(line_form, found)
    assert expected in line


SOUND = json.dumps(comment(50, None, "s9", "gus"))
BROKEN = {
    "endless score": (SOUND.replace('"score": 5', '"score": 1e999'), "score: must be a whole number. Given: Infinity."),
    "endless time": (SOUND.replace("50}", "Infinity}"), "holds Infinity, which is not JSON."),
    "no number": (SOUND.replace("50}", "NaN}"), "holds NaN, which is not JSON."),
    "words for a number": (SOUND.replace("50}", '"now"}'), 'created_utc: must be a whole number. Given: "now".'),
    "no score": (SOUND.replace('"score": 5, ', ""), "score: is missing."),
    "no text": (SOUND.replace('"words of number 50"', "null"), "body: must be a text. Given: null."),
    "nobody": (SOUND.replace('"gus"', "null"), "author: must be a text. Given: null."),
    "half a letter": (SOUND.replace("words", r"\ud83d"), r"body: cannot be UTF-8: \ud83d is half of a surrogate pair."),
    "a list": ("[1]", "must be an object. Given: [1]."),
    "half a line": (SOUND[:20], "is not JSON: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_acc_D03_a_broken_line_is_one_finding_with_its_place(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    It is told by file and line, and counted; the other lines make the same rows. Inverse seen: the old reader, which
    ended at the first two and wrote the half letter into nothing; a line number that begins at 0.
    """
    line, expected = BROKEN[case]
    sound = [*earlier(), comment(10, None, "s1", "cem"), comment(11, 10, "s1", "ann")]
    head, tail = dump(sound[:2]), dump(sound[2:])
    (tmp_path / "RC.jsonl").write_bytes(b"\n".join([head, line.encode(), tail]))

    code = main(["data", "convert", "pushshift", str(tmp_path / "RC.jsonl"), "-o", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()

    assert code == 0
    (told,) = (text for text in printed if text.startswith("E-DATA-"))
    assert "  RC.jsonl:3  " + expected in told
    assert "Left out: 1 lines that are no comments" in printed
    rows = [json.loads(row) for row in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert rows == [*convert("pushshift", dump(sound)).train]


def test_acc_D03_a_file_of_broken_lines_says_what_the_first_one_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So many findings are kept, all lines are counted; the command names the first, and ends with exit code 3."""
    document = b"\n".join([b'{"id": "a"}'] * 50)
    (tmp_path / "RC.jsonl").write_bytes(document)
    split = convert("pushshift", document)
    code = main(["data", "convert", "pushshift", str(tmp_path / "RC.jsonl"), "-o", str(tmp_path / "out")])

    assert split.dropped == {"lines that are no comments": 50}
    assert [item.line for item in split.findings] == list(range(1, MAX_FINDINGS + 1))
    assert code == 3
    assert "RC.jsonl holds no rows. E-DATA-008  RC.jsonl:1  parent_id: is missing." in capsys.readouterr().err


@pytest.mark.parametrize("body", ["## ##", "# yes"])
def test_acc_D03_words_are_counted_as_a_turn_says_them(body: str) -> None:
    """
    A comment of nothing but signs has no word, and one word beside a sign is one: both are left out where they begin a
    conversation, which has no turn without words then. Inverse seen: words counted before the signs are taken away.
    """
    comments = [*earlier(), comment(10, None, "s1", "cem", body=body), comment(11, 10, "s1", "ann")]
    comments += [comment(12, None, "s1", "cem"), comment(13, 12, "s1", "ann")]
    dropped: Counter[str] = Counter()
    train, _ = pushshift_rows(dump(comments), dropped)

    assert dropped["comments of fewer than 2 words"] == 1
    assert [row["ts"] for row in train] == [13]
