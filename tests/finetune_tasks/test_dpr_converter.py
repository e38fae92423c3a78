"""Rows of `dpr` from questions and passages: who is a positive, who a hard negative, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trilithon_finetune.converters import convert
from trilithon_finetune.metrics.retrieval import has_answer
from trilithon_finetune.recipes import RECIPES
from trilithon_server.knowledge.passages import passage_line, passages_of

SharedData = Callable[[str], Path]

PARAGRAPHS = {
    "stones": "The mason set two stones upright. In winter the river froze and the miller counted 12 sacks.",
    "letters": "Ada wrote the letter twice, once in pencil. The river froze when she was done.",
}


def squad(*questions: tuple[str, str, str]) -> bytes:
    """A document with an article of one paragraph for each (title, question, answer)."""
    articles = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": PARAGRAPHS[title],
                    "qas": [{"question": question, "answers": [{"text": answer}] if answer else []}],
                }
            ],
        }
        for title, question, answer in questions
    ]
    return json.dumps({"data": articles}).encode()


def passages(words: int = 6) -> bytes:
    """Both paragraphs in passages of so many words."""
    cut = [item for title, text in PARAGRAPHS.items() for item in passages_of(title, title, text, words=words)]
    return b"".join(map(passage_line, cut))


def rows_of(*documents: bytes) -> tuple[list[dict[str, Any]], dict[str, int]]:
    split = convert("dpr", *documents)
    return [dict(row) for row in (*split.train, *split.dev)], dict(split.dropped)


def ids(items: Sequence[dict[str, str]]) -> list[str]:
    return [item["id"] for item in items]


def test_the_positive_is_the_passage_of_the_paragraph_that_holds_the_answer() -> None:
    """
    Another paragraph's passage with the same answer is neither that nor a hard negative. Inverse seen: passages with
    the answer kept.
    """
    ((row,), dropped) = rows_of(squad(("stones", "what did the river do in winter", "froze")), passages())

    assert ids(row["positive_ctxs"]) == ["stones:1"]
    assert row["answers"] == ["froze"]
    assert "letters:1" not in ids(row["hard_negative_ctxs"])
    assert dropped == {"hard negatives that hold an answer": 1}


def test_hard_negatives_share_words_and_hold_no_answer() -> None:
    """Those of the question's own paragraph, too."""
    ((row,), _) = rows_of(squad(("stones", "the mason and the river", "12")), passages())
    found = row["hard_negative_ctxs"]

    assert ids(row["positive_ctxs"]) == ["stones:2"]
    assert found
    assert not any(has_answer(item["text"], row["answers"]) for item in found)
    assert "stones:0" in ids(found)


def test_what_cannot_be_learned_is_counted() -> None:
    """Questions without an answer, and those whose answer was cut in two."""
    rows, dropped = rows_of(
        squad(("stones", "who came", ""), ("stones", "what was set", "stones upright. In winter")), passages()
    )

    assert rows == []
    assert dropped == {
        "questions without an answer": 1,
        "questions whose answer is in no passage of their paragraph": 1,
    }


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ((b"[]", passages()), "the first file must be one JSON object"),
        ((squad(), b'{"id": "a", "title": ""}\n'), "line 1 of the passages must have the field"),
        ((squad(), passages() * 2), "id must not repeat"),
    ],
    ids=["questions", "passage", "twice"],
)
def test_R11_broken_files_are_told(documents: tuple[bytes, bytes], message: str) -> None:
    """With the place."""
    with pytest.raises(ValueError, match=message):
        convert("dpr", *documents)


def test_xquad_becomes_rows(shared_data: SharedData) -> None:
    """Of 991 questions nearly all have a passage of 100 words; all rows are sound, and no article is on both sides."""
    document = shared_data("qa/xquad_en.json").read_bytes()
    articles = json.loads(document)["data"]
    cut = [
        item
        for i, article in enumerate(articles)
        for j, paragraph in enumerate(article["paragraphs"])
        for item in passages_of(f"{i}.{j}", article["title"], paragraph["context"])
    ]
    split = convert("dpr", document, b"".join(map(passage_line, cut)))
    rows = [*split.train, *split.dev]
    missing = split.dropped.get("questions whose answer is in no passage of their paragraph", 0)
    recipe = RECIPES["dpr"]

    assert len(cut) == 340
    assert len(rows) + missing == 991
    assert missing < 20
    assert sum(len(row["hard_negative_ctxs"]) == 7 for row in rows) > 0.95 * len(rows)
    assert not any(recipe.check(row, recipe.formats[0], file="f", line=i) for i, row in enumerate(rows))
    sides = [
        {item["id"].partition(".")[0] for row in side for item in row["positive_ctxs"]}
        for side in (split.train, split.dev)
    ]
    assert not sides[0] & sides[1]
