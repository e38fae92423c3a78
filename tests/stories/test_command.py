"""`trilithon story` against a real server: told, told again, as JSON, on a terminal, and wrong commands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import Server

from trilithon import Client, Story
from trilithon.cli import main
from trilithon.cli._output import printable

FIRST = "The old miller had a dog."
DRAWN = ("--model", "writer", "--seed", "5", "--max-tokens", "12")
CONTROLS = ("--replace", "2=boat, quark", "--antonym", "3=early friend,boat", "--append", "4=lamp")


def run(*arguments: str) -> int:
    return main(["story", *arguments])


def whole(server: Server) -> Story:
    """What the command's story is by the client."""
    with Client(server.url) as client:
        return client.stories.generate(
            FIRST,
            knowledge_k=2,
            controls=[
                {"index": 2, "keywords": ["boat", "quark"]},
                {"index": 3, "keywords": ["early friend", "boat"], "mode": "antonym"},
                {"index": 4, "keywords": ["lamp"], "mode": "append"},
            ],
            model="writer",
            seed=5,
            max_tokens=12,
        )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_story_is_printed_with_what_it_stands_on(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    """
    Each sentence with its keywords, its facts, and those that are unknown or have no opposite; how to go on stands
    apart. A terminal gets the same lines with styles. Inverse seen: `append` sent as `replace`.
    """
    told = whole(server)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setenv("TERM", "dumb")  # styles are left to rich: a dumb terminal shows none
    code = run(FIRST, *DRAWN, *CONTROLS, "--knowledge-k", "2", "--url", server.url)
    out = capsys.readouterr()
    lines = [line.rstrip() for line in out.out.splitlines()]

    assert code == 0
    assert [line for line in lines if line[0].isdigit()] == [
        printable(f"{one.index}. {one.text}").rstrip() for one in told.sentences
    ]
    assert "   keywords: boat, quark" in lines
    assert "   nothing is known of: quark" in lines
    assert "   keywords: late friend, boat" in lines
    assert "   has no opposite: boat" in lines
    assert [line for line in lines if line.startswith("   knowledge: ")] == [
        f"   knowledge: {fact.text} ({fact.score:.2f})" for one in told.sentences for fact in one.facts
    ]
    assert told.sentences[3].keywords[0] == "lamp"
    assert printable(f"   keywords: {', '.join(told.sentences[3].keywords)}") in lines
    assert "--rewrite story_" in out.err


def test_a_story_is_told_again_by_its_name(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON holds the whole story; a rewrite keeps what stands before the sentence, and antonyms need no words."""
    assert run(FIRST, *DRAWN, "--replace", "3=early friend", "-o", "json", "--url", server.url) == 0
    story: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert run("--rewrite", story["story_id"], "--antonym", "3", "-o", "json", "--url", server.grpc_target) == 0
    again: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert [one["reused"] for one in again["sentences"]] == [True, True, False, False, False]
    assert [one["text"] for one in again["sentences"][:2]] == [one["text"] for one in story["sentences"][:2]]
    assert again["sentences"][2]["keywords"] == ["late friend"]
    assert (again["story_id"], again["seed"]) == (story["story_id"], 5)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "needs a SENTENCE that the story begins with, or --rewrite STORY_ID"),
        ((FIRST, "--replace", "3"), 2, "argument --replace: must be INDEX=WORD[,WORD...]. Given: '3'"),
        ((FIRST, "--replace", "x=boat"), 2, "argument --replace: must be INDEX=WORD[,WORD...]. Given: 'x=boat'"),
        ((FIRST, "--append", "3=boat,,lamp"), 2, "argument --append: must be INDEX=WORD[,WORD...]"),
        ((FIRST, "--antonym", "3="), 2, "argument --antonym: must be INDEX[=WORD,...]. Given: '3='"),
        ((FIRST, "--rewrite", "story_0", "--seed", "3"), 2, "--rewrite must come without SENTENCE, --seed"),
        (("--rewrite", "story_0"), 2, "--rewrite must come with one control"),
        (("--rewrite", "story_0", "--antonym", "2", "--antonym", "3"), 2, "Given: 2"),
        (("--rewrite", "story_0", "--replace", "2=boat"), 2, "no story"),
        ((FIRST, "--model", "writer", "--replace", "9=boat"), 2, "controls[0].index must be from 2 to 5"),
        ((FIRST, "--replce", "3=boat"), 2, "unknown flag '--replce'. Did you mean '--replace'?"),
    ],
)
def test_R11_a_wrong_command_is_told(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    """One sentence with the flag or the field, the value and what is allowed; nothing is printed as a story."""
    assert run(*arguments, "--url", server.url) == code
    out = capsys.readouterr()

    assert sentence in out.err.replace("`", "")
    assert out.out == ""
