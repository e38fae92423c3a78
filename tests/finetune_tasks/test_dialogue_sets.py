"""Conversations of published sets as rows: what is kept, what is left out and counted, and that nothing leaks."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from finetune_tasks.comment_dumps import comment, dump, earlier
from hypothesis import given
from hypothesis import strategies as st

from trilithon.cli import _data_convert
from trilithon_finetune.converters import convert
from trilithon_finetune.converters.pushshift import MAX_PATHS, MAX_REFERENCES, pushshift_rows

SharedData = Callable[[str], Path]


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "deleted": ({"body": "[deleted]"}, "comments that were deleted"),
    "no author": ({"author": "[deleted]"}, "comments that were deleted"),
    "quote": ({"body": "> you said this\nand I disagree"}, "comments that quote"),
    "escaped quote": ({"body": "&gt; you said this"}, "comments that quote"),
    "short": ({"body": "no"}, "comments of fewer than 2 words"),
    "long": ({"body": "word " * 129}, "comments of more than 128 words"),
    "address": ({"body": "look at https://example.org/page now"}, "turns with an address"),
    "brackets": ({"body": "as [1] has it"}, "turns with brackets"),
    "capitals": ({"body": "this is GREAT news"}, "turns in capitals"),
    "long word": ({"body": f"a word of {'x' * 31}"}, "turns with a word of more than 30 letters"),
    "thrice": ({"body": "very very very good"}, "turns that say a word three times running"),
    "score": ({"score": 0}, "turns scored below 1"),
    "no number": ({"score": "many"}, "lines that are no comments"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_acc_D03_a_planted_violation_is_counted_under_its_reason(case: str) -> None:
    """Ann's second conversation is learned from, unless its last turn has the fault."""
    changes, reason = PLANTED[case]
    second = [comment(10, None, "s1", "cem"), comment(11, 10, "s1", "ann")]
    sound: Counter[str] = Counter()
    faulty: Counter[str] = Counter()
    good = pushshift_rows(dump([*earlier(), *second]), sound)
    second[-1] |= changes
    bad = pushshift_rows(dump([*earlier(), *second]), faulty)

    assert [row["target"][-1]["text"] for side in good for row in side] == ["words of number 11"]
    assert sound[reason] == 0
    assert [row for side in bad for row in side] == []
    assert faulty[reason] == 1


UNWANTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "word": ("Heck", {"body": "oh heck, what a day"}, "turns with a blocked word"),
    "word among signs": ("h*ck", {"body": "what the 'h*ck'?"}, "turns with a blocked word"),
    "word joined": ("heck", {"body": "a heck-load of words"}, "turns with a blocked word"),
    "community": ("r/Shouting", {"subreddit": "shouting"}, "comments of a blocked community"),
}


@pytest.mark.parametrize("case", UNWANTED)
def test_acc_D03_what_a_block_list_names_is_left_out_and_counted(case: str) -> None:
    """
    Of the same comments, with and without the list. A word is whole: `heckle` is learned. Inverse seen: a list that is
    not looked at; words with the signs around them; a word anywhere in another; names that keep their capitals.
    """
    line, changes, reason = UNWANTED[case]
    second = [comment(10, None, "s1", "cem"), comment(11, 10, "s1", "ann", **changes)]
    third = [comment(20, None, "s2", "dea"), comment(21, 20, "s2", "ann", body="they heckle all day")]
    comments = [{"subreddit": "Tea", **item} for item in (*earlier(), *second, *third)]
    without = convert("pushshift", dump(comments))
    split = convert("pushshift", dump(comments), f"{line}\n\n".encode())

    assert [row["ts"] for row in (*without.train, *without.dev)] == [11, 21]
    assert [row["ts"] for row in (*split.train, *split.dev)] == [21]
    assert (without.dropped.get(reason, 0), split.dropped[reason]) == (0, 1)


def test_acc_D03_where_communities_are_blocked_a_comment_must_say_its_own() -> None:
    """A line that does not is one finding. Inverse seen: such a line is read."""
    comments = [{"subreddit": "Tea", **item} for item in earlier()]
    split = convert("pushshift", dump([*comments, comment(10, None, "s1", "cem")]), b"r/Shouting")

    assert [(item.line, item.path) for item in split.findings] == [(4, "subreddit")]


@pytest.mark.parametrize("line", ["two words", "r/", "r/two words", "?!"])
def test_a_line_that_blocks_nothing_is_refused(line: str) -> None:
    """With its number and what is allowed."""
    with pytest.raises(ValueError, match=re.escape("line 2: a line of what is not wanted must be one word, or r/")):
        convert("pushshift", dump(earlier()), f"heck\n{line}\n".encode())


LEFT_OUT: dict[str, tuple[list[dict[str, Any]], str]] = {
    "alone": ([comment(20, None, "s2", "dea")], "submissions of fewer than 2 comments"),
    "twice": ([comment(11, 10, "s1", "ann")], "comments that stand there twice"),
    "no beginning": (
        [comment(20, 19, "s2", "dea"), comment(21, 20, "s2", "eve")],
        "conversations whose beginning was left out",
    ),
    "in a circle": (
        [
            comment(20, 21, "s2", "dea"),
            comment(21, 20, "s2", "eve"),
            comment(22, 21, "s2", "dea"),
        ],
        "conversations whose beginning was left out",
    ),
    "one turn": ([comment(12, None, "s1", "dea")], "conversations of one turn"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_acc_D02_what_makes_no_conversation_is_counted_under_its_reason(case: str) -> None:
    """
    Beside a sound conversation: it is counted once, and makes no row. Inverse seen: submissions of any size; comments
    of one id taken again; a beginning that is not looked for; a conversation of one turn.
    """
    planted, reason = LEFT_OUT[case]
    sound = [*earlier(), comment(10, None, "s1", "cem"), comment(11, 10, "s1", "ann")]
    without: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    rows = pushshift_rows(dump(sound), without)

    assert pushshift_rows(dump([*sound, *planted]), dropped) == rows
    assert (without[reason], dropped[reason]) == (0, 1)
    assert +(dropped - without) == {reason: 1}


def test_acc_D02_a_turn_that_is_not_learned_is_counted_under_its_reason() -> None:
    """
    In the first submission bob begins and ann answers: neither is known from before. In the second cem, who is new,
    begins; two conversations pass through ann's turn, which is learned once. Inverse seen: a turn that is learned in
    each conversation; a first turn that is learned.
    """
    first = [comment(0, None, "s0", "bob"), comment(1, 0, "s0", "ann")]
    second = [
        comment(10, None, "s1", "cem"),
        comment(11, 10, "s1", "ann"),
        comment(12, 11, "s1", "dea"),
        comment(13, 11, "s1", "eve"),
    ]
    dropped: Counter[str] = Counter()
    train, dev = pushshift_rows(dump([*first, *second]), dropped)

    assert [[turn["text"] for turn in row["target"]] for row in (*train, *dev)] == [
        ["words of number 10", "words of number 11"]
    ]
    assert +dropped == {
        "turns that nothing stands before": 3,
        "actors without an earlier conversation": 3,
        "turns that are learned in another conversation": 1,
    }


def test_acc_D02_addresses_and_tags_do_not_travel() -> None:
    """
    Before the turn that is learned, an address is told as `__url__` and a tag loses its sign, in the target as in the
    references. Inverse seen: addresses as they stood; tags as they stood.
    """
    old = earlier()
    old[0]["body"] = "see http://example.org/a?b=c#d for #more of it"
    asked = comment(10, None, "s1", "cem", body="  what does www.example.org say\n about #tea and #2? ")
    train, dev = pushshift_rows(dump([*old, asked, comment(11, 10, "s1", "ann")]), Counter())
    (row,) = (*train, *dev)

    assert [turn["text"] for turn in row["target"]] == ["what does __url__ say about tea and 2?", "words of number 11"]
    assert row["refs"][0][0]["text"] == "see __url__ for more of it"


def test_acc_D03_broken_lines_and_packed_dumps_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line cut in half is one thing left out, whatever packs the file; the rest makes the same rows."""
    lines = [*earlier(), comment(10, None, "s1", "cem"), comment(11, 10, "s1", "ann")]
    whole = dump(lines)
    broken = whole.replace(b'"author": "cem"', b'"author": "cem", \n', 1)
    plain, packed = tmp_path / "RC.jsonl", tmp_path / "RC.zst"
    plain.write_bytes(whole + b'\n{"id": "c99", "par')
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        writer.write(plain.read_bytes())
    packed.write_bytes(buffer.getvalue())

    split = convert("pushshift", plain.read_bytes())
    assert split.dropped["lines that are no comments"] == 1
    assert split.train == convert("pushshift", whole).train != ()
    assert convert("pushshift", broken).dropped["lines that are no comments"] == 2
    assert _data_convert._read(packed) == plain.read_bytes()
    packed.write_bytes(buffer.getvalue()[:-9] + b"damaged!!")
    with pytest.raises(_data_convert.UsageError, match="IN must be a readable file"):
        _data_convert._read(packed)


TREES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 40), st.sampled_from(["ann", "bob", "cem", "dea"])), max_size=60
)


@given(TREES)
def test_acc_D02_references_are_older_and_from_elsewhere(made: list[tuple[int, int, str]]) -> None:
    """
    Whatever trees: a reference ends before its target begins and is of another submission; no submission stands on both
    sides; no name of an author is in a row. Inverse seen: references chosen without a look at the time.
    """
    comments = []
    members: dict[str, list[int]] = {}
    for number, (where, parent, author) in enumerate(made):
        submission = f"s{where}"
        known = members.setdefault(submission, [])
        comments.append(comment(number, known[parent % len(known)] if known and parent else None, submission, author))
        known.append(number)
    dropped: Counter[str] = Counter()
    train, dev = pushshift_rows(dump(comments), dropped)
    submission_of = {f"words of number {number}": f"s{where}" for number, (where, _, _) in enumerate(made)}

    def second(turn: dict[str, str]) -> int:
        return int(turn["text"].rsplit(" ", 1)[1])

    for row in (*train, *dev):
        target = row["target"]
        here = {submission_of[turn["text"]] for turn in target}
        assert len(here) == 1
        assert target[-1]["author"] == row["actor"] == "u1"
        assert 1 <= len(row["refs"]) <= MAX_REFERENCES
        for conversation in row["refs"]:
            assert any(turn["author"] == "u1" for turn in conversation)
            assert max(map(second, conversation)) < min(map(second, target))
            assert {submission_of[turn["text"]] for turn in conversation}.isdisjoint(here)
        assert not {"ann", "bob", "cem", "dea"} & set(json.dumps(row).replace('"', " ").split())
    sides = [{submission_of[row["target"][0]["text"]] for row in side} for side in (train, dev)]
    assert sides[0].isdisjoint(sides[1])


def test_a_busy_submission_gives_few_conversations() -> None:
    """Of twenty answers to one comment only so many are taken, and how many were not is told."""
    crowd = [comment(10 + i, 9, "s1", f"a{i}") for i in range(20)]
    dropped: Counter[str] = Counter()
    pushshift_rows(dump([comment(9, None, "s1", "ann"), *crowd]), dropped)

    assert dropped[f"conversations beyond {MAX_PATHS} of a submission"] == 20 - MAX_PATHS


def test_acc_D04_persona_chat_is_read_as_counted(shared_data: SharedData) -> None:
    """500 dialogues with a row for each side; lines joined and left out are told, one speaker twice running is kept."""
    split = convert("persona_chat", shared_data("dialogue/synthetic_persona_chat_valid.jsonl").read_bytes())
    rows = [*split.train, *split.dev]
    dialogues = [row["target"] for row in rows if row["actor"] == "u1"]
    twice = [sum(a["author"] == b["author"] for a, b in itertools.pairwise(turns)) for turns in dialogues]

    assert (len(split.train), len(split.dev)) == (800, 200)
    assert sum(map(len, dialogues)) == 14_116
    assert dict(split.dropped) == {
        "lines that go on with the turn before (joined)": 73,
        "lines before the first turn": 8,
    }
    assert (sum(twice), sum(map(bool, twice))) == (32, 16)
    assert all(turn["author"] == row["actor"] for row in rows for turn in row["refs"][0])
