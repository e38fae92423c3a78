"""Passages that a model writes from titles: what is kept of them, the same each time, and on from an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import CHOICE, GENERATED, Reply, http_server
from scripted import Asked as Question
from synthesis.synthesizing import Asked, parts, serving_parts

from trilithon import Client
from trilithon.cli import main
from trilithon.cli._synth_qa_passages import TOP_P, Writing, passage_of, repeated_share, seed_of, sieve

TITLES = ["The mill", "Ada", "Winter of 1728"]
COUNT, TOKENS, FEWEST, SEED = 6, 80, 5, 8
WORDS = [f"word{n}" for n in range(200)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    with serving_parts(*parts(tmp_path_factory.mktemp("parts"))) as asked:
        yield asked


@pytest.fixture
def titles(tmp_path: Path) -> Path:
    path = tmp_path / "titles.txt"
    path.write_text("\n".join(["", *TITLES, "  "]), encoding="utf-8")
    return path


def run(*arguments: str | Path | int) -> int:
    return main(["synth-qa", *map(str, arguments)])


def a_run(served: Asked, titles: Path, out: Path, **more: Any) -> list[str]:
    """Arguments: passages of which some are long enough."""
    named = {"generate": COUNT, "titles": titles, "passage-model": "words", "passage-tokens": TOKENS, "seed": SEED,
             "min-words": FEWEST, "filter": "none", "url": served.server.url, "output": out, **more}  # fmt: skip
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def sieved(*texts: str) -> tuple[list[str], dict[str, int]]:
    found = sieve(texts, Writing(titles=TITLES, count=len(texts), seed=1))
    return [document.text for document in found.corpus], found.dropped


def test_what_cannot_be_asked_about_is_dropped() -> None:
    """
    Fewer than fifty words, more than one in twenty runs of four words that stood there before, a text that was there;
    each under one reason. Both limits are met from either side. Inverse seen: runs compared with their case.
    """
    sound = " ".join(WORDS[:50])
    few = " ".join(WORDS[:49])
    # Of 40 runs two are repeated: a share of 0.05, which may be; of 39 runs it is more.
    at_most = [*WORDS[:38], *(word.upper() for word in WORDS[10:15])]
    assert repeated_share(at_most) == pytest.approx(0.05)
    assert repeated_share(at_most[1:]) == pytest.approx(2 / 39)
    padded = Writing(titles=TITLES, count=2, seed=1, words=1)
    found = sieve([" ".join(at_most), " ".join(at_most[1:])], padded)

    assert sieved(sound, few, sound, few) == ([sound], {"too_short": 2, "duplicate": 1})
    assert ([document.text for document in found.corpus], found.dropped) == ([" ".join(at_most)], {"repetitive": 1})


def test_passages_stand_by_their_titles() -> None:
    """Numbers name them; neighbours of one title become one article."""
    texts = [" ".join(WORDS[n : n + 60]) for n in range(5)]
    found = sieve(texts, Writing(titles=TITLES[:2], count=5, seed=1))

    assert [(one.id, one.title) for one in found.corpus] == [
        ("1", "The mill"), ("3", "The mill"), ("5", "The mill"), ("2", "Ada"), ("4", "Ada"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "is_cut", "expected"),
    [
        ('One day.\n\nIt was "late." The mi', True, 'One day. It was "late."'),
        ("One day. The end", False, "One day. The end"),
        ("In 1.5 hours", True, ""),
    ],
)
def test_a_cut_passage_ends_with_a_sentence(text: str, is_cut: bool, expected: str) -> None:
    """What the limit cut off goes; what the model ended stays as it is."""
    assert passage_of(text, is_cut=is_cut) == expected


def test_passages_are_written_and_asked_about(
    served: Asked, titles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Each is what the plain route draws from its title and its seed; the file asks about those that were kept, and the
    summary counts the others. No file of the way is left.
    """
    out = tmp_path / "made.json"
    code = run(*a_run(served, titles, out), "--format", "json")
    told = json.loads(capsys.readouterr().out)
    made = json.loads(out.read_text("utf-8"))
    texts = []
    with Client(served.server.url) as client:
        for number in range(COUNT):
            answer = client.generate(
                f"{TITLES[number % 3]}\n\n", model="words", temperature=1.0, top_p=TOP_P, seed=seed_of(SEED, number),
                max_tokens=TOKENS,
            )  # fmt: skip
            texts.append(passage_of(answer[0].text, is_cut=answer[0].finish_reason == "max_tokens"))
    expected = sieve(texts, Writing(titles=TITLES, count=COUNT, seed=SEED, words=FEWEST))

    assert code == 0
    assert 1 < len(expected.corpus) < COUNT
    assert told["generated"] == {"kept": len(expected.corpus), "dropped": expected.dropped}
    assert told["passages"] == len(expected.corpus)
    assert told["models"]["passage_model"] == "words"
    asked = {paragraph["context"] for article in made["data"] for paragraph in article["paragraphs"]}
    assert asked
    assert asked <= {document.text for document in expected.corpus}
    assert {article["title"] for article in made["data"]} <= set(TITLES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.json", "titles.txt"]


def test_acc_E09_writing_goes_on_where_it_stopped(
    served: Asked, titles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    After any passage, in the middle of a line, and at another batch size: the file of an undisturbed run. Other titles
    are refused. Inverse seen: a seed that counts what is left to write.
    """
    whole, again = tmp_path / "whole.json", tmp_path / "again.json"
    kept = tmp_path / "kept.json"
    (tmp_path / ".kept.json.new").mkdir()
    assert run(*a_run(served, titles, whole)) == 0
    with pytest.raises(IsADirectoryError):
        run(*a_run(served, titles, kept, batch=3))
    lines = kept.with_name("kept.json.passages").read_text("utf-8").splitlines()
    part = again.with_name("again.json.passages")
    for done in (1, 4):
        part.write_text("".join(f"{line}\n" for line in lines[: done + 1]) + lines[done + 1][:9], encoding="utf-8")
        assert run(*a_run(served, titles, again, batch=done % 7)) == 0
        assert json.loads(again.read_text("utf-8")) == json.loads(whole.read_text("utf-8"))
    part.write_text(f"{lines[0]}\n{lines[1]}\n", encoding="utf-8")
    titles.write_text("Another\n", encoding="utf-8")

    assert len(lines) == 1 + COUNT
    assert run(*a_run(served, titles, again)) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "give either a CORPUS, or --generate N"),
        (["corpus.jsonl", "--generate", "3", "--titles", "titles.txt"], 2, "give either a CORPUS"),
        (["--generate", "3"], 2, "--generate and --titles must be given together"),
        (["corpus.jsonl", "--titles", "titles.txt"], 2, "--generate and --titles must be given together"),
        (["--generate", "0", "--titles", "titles.txt"], 2, "--generate must be at least 1. Given: 0"),
        (["--generate", "3", "--titles", "none.txt"], 2, "--titles must be a readable text file. Given: none.txt"),
        (["--generate", "3", "--titles", "empty.txt"], 3, "empty.txt holds no title"),
        (["--generate", "3", "--titles", "long.txt"], 3, "long.txt:1 title: must have at most 200 characters"),
    ],
)
def test_R11_a_wrong_command_is_told(
    titles: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int,
    says: str,
) -> None:  # fmt: skip
    """Before anything is asked."""
    monkeypatch.chdir(titles.parent)
    (titles.parent / "empty.txt").write_text("\n \n")
    (titles.parent / "long.txt").write_text("x" * 201)

    assert run(*arguments, "-o", "out.json", "--url", "http://127.0.0.1:1") == code
    assert says in capsys.readouterr().err


def test_R7_a_passage_that_time_cut_off_is_not_kept(
    titles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    The command ends as where time does not suffice for a question, keeps what was whole, and writes the others when it
    is run again. Inverse seen red: what there was of it kept for good.
    """
    ends = {"Ada\n\n": "time_limit"}

    def reply(asked: Question) -> Reply:
        choice = {**CHOICE, "text": f"About {asked.body['prompt'].strip()}. And", "finish_reason": None}
        return Reply(
            body={**GENERATED, "choices": [{**choice, "finish_reason": ends.get(asked.body["prompt"], "eos")}]}
        )

    with http_server() as server:
        server.answer = reply
        command = ("--generate", 3, "--titles", titles, "-o", tmp_path / "made.json", "--url", server.url, "--batch", 1)
        first, told = run(*command), capsys.readouterr().err
        asked = [question.body["prompt"] for question in server.asked]
        ends.clear()
        second = run(*command)
        again = [question.body["prompt"] for question in server.asked[len(asked) :]]

    assert (first, second) == (5, 3)  # all are whole then, and too short to be asked about
    assert "before passage 2 was written. Run the command again." in told
    assert "1 of 3 passages are kept" in told
    assert asked == ["The mill\n\n", "Ada\n\n"]
    assert again == ["Ada\n\n", "Winter of 1728\n\n"]


def test_nothing_to_ask_about_is_told(
    served: Asked, titles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why, and no file is written; what was written stays for another try with other limits."""
    out = tmp_path / "made.json"
    first = run(*a_run(served, titles, out, **{"min-words": 500}))
    told = capsys.readouterr().err
    second = run(*a_run(served, titles, out))

    assert (first, second) == (3, 0)
    assert "none of the 6 passages can be asked about: 6 have too few words" in told
