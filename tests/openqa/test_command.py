"""`trilithon index` on a server and in a folder: the same files, the same vectors, the same passages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from open_questions import ALICE, ENCODER, SPANS, Open

from trilithon._jobs import Files
from trilithon.cli import _index_doors, main
from trilithon.errors import ConnectionFailed
from trilithon_server.knowledge.version import IndexVersion

LINES = [
    {"id": "coast", "title": "The coast", "text": "The sea is two days from the old mill."},
    {"id": "hills", "title": "", "text": "Behind the mill the hills begin."},
    {"id": "town", "title": "Town", "text": "The town has a market."},
]
QUESTION = "How far is the sea?"


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Three passages."""
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path)


@pytest.fixture(params=["server", "folder"])
def place(request: pytest.FixtureRequest, served: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags of one place."""
    return flags(request.param, served, tmp_path, monkeypatch)


def flags(kind: str, served: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    if kind == "folder":
        return ["--dir", str(tmp_path / "indexes")]
    monkeypatch.setenv("TRILITHON_API_KEY", ALICE)
    return ["--url", served.server.url]


def encoder(place: list[str], served: Open, name: str = ENCODER) -> list[str]:
    return ["--model", name if place[0] == "--url" else str(served.folder / name)]


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["index", *arguments, "-o", "json"]) == code, capsys.readouterr().err
    out = capsys.readouterr()
    return json.loads(out.out if code == 0 else out.err.splitlines()[-1])


def test_an_index_is_built_searched_refreshed_and_removed(
    place: list[str], served: Open, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every action, as JSON and as text, in either place."""
    built = told(capsys, "build", "cli", file, *place, *encoder(place, served))
    listed = told(capsys, "ls", *place)
    first = told(capsys, "search", "cli", QUESTION, *place, "--top-k", "2")
    by_words = told(capsys, "search", "cli", QUESTION, "market", *place, "--mode", "bm25")
    taken = told(capsys, "build", "cli", file, *place, *encoder(place, served), code=2)
    assert main(["index", "search", "cli", QUESTION, *place, "--mode", "hybrid"]) == 0
    text = capsys.readouterr().out
    refreshed = told(capsys, "refresh", "cli", *place, *encoder(place, served, SPANS))
    second = told(capsys, "search", "cli", QUESTION, *place, "--top-k", "2")
    wrong = told(capsys, "search", "cli", QUESTION, *place, *encoder(place, served), code=2)
    removed = told(capsys, "rm", "cli", *place)
    gone = told(capsys, "search", "cli", QUESTION, *place, code=2)

    assert (built["state"], built["version"], built["passages"], built["backend"]) == ("ready", 1, 3, "flat")
    assert [item["name"] for item in listed if item["name"] == "cli"] == ["cli"]
    assert (len(first["results"][0]["passages"]), first["index_version"]) == (2, 1)
    assert [hits["passages"][0]["id"] for hits in by_words["results"]] == ["coast", "town"]
    assert taken["error"]["code"] == "name_taken"
    assert QUESTION in text
    assert "The coast: The sea is two days" in text
    assert (refreshed["version"], second["index_version"]) == (2, 2)
    assert first["results"] != second["results"]
    assert wrong["error"]["code"] == "index_encoder"
    assert removed == {"deleted": "cli"}
    assert gone["error"]["code"] == "index_not_found"


def test_R11_a_folder_with_a_broken_index_is_listed(
    served: Open, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It failed, and can be removed; the others are told as ever."""
    place = ["--dir", str(tmp_path / "indexes")]
    for name in ("broken", "whole"):
        told(capsys, "build", name, file, *place, *encoder(place, served))
    (tmp_path / "indexes" / "broken" / "current").write_text("")
    listed = told(capsys, "ls", *place)
    told(capsys, "rm", "broken", *place)

    assert [(item["name"], item["state"], item["passages"]) for item in listed] == [
        ("broken", "failed", 0),
        ("whole", "ready", 3),
    ]
    assert "current must hold a version" in listed[0]["error"]
    assert [item["name"] for item in told(capsys, "ls", *place)] == ["whole"]


def test_the_version_that_was_searched_is_told(
    served: Open, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer one may be published while an older one is searched. Inverse seen: the newer one's number was told."""
    place = ["--dir", str(tmp_path / "indexes")]
    told(capsys, "build", "moved", file, *place, *encoder(place, served))
    plain = IndexVersion.search

    def overtaken(index: IndexVersion, *arguments: Any, **named: Any) -> Any:
        monkeypatch.undo()
        told(capsys, "refresh", "moved", *place)
        return plain(index, *arguments, **named)

    monkeypatch.setattr(IndexVersion, "search", overtaken)
    first = told(capsys, "search", "moved", QUESTION, *place, "--mode", "bm25")
    second = told(capsys, "search", "moved", QUESTION, *place, "--mode", "bm25")

    assert (first["index_version"], second["index_version"]) == (1, 2)


def test_an_upload_does_not_outlive_its_build(
    served: Open, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, failed or refused, no file is left on the server; where the name is taken none is sent at all."""
    place = flags("server", served, tmp_path, monkeypatch)

    def kept() -> list[Any]:
        files: list[Any] = served.http.get("/v1/files", params={"purpose": "evidence"}).json()["data"]
        return files

    before = kept()
    sent: list[Any] = []
    plain = Files.upload
    monkeypatch.setattr(Files, "upload", lambda *given, **named: sent.append(given) or plain(*given, **named))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    told(capsys, "build", "brief", file, *place, *encoder(place, served))
    after = [kept()]
    failed = told(capsys, "build", "unsound", str(bad), *place, *encoder(place, served), code=2)
    after.append(kept())
    assert "bad.jsonl:1 must have the field" in failed["error"]["message"]
    refused = told(capsys, "build", "none", file, *place, "--model", "nobody", code=2)
    after.append(kept())
    count = len(sent)
    taken = told(capsys, "build", "brief", file, *place, *encoder(place, served), code=2)
    again = told(capsys, "build", "unsound", file, *place, *encoder(place, served))
    for name in ("brief", "unsound"):
        told(capsys, "rm", name, *place)

    assert after == [before] * 3
    assert [error["error"]["code"] for error in (failed, refused)] == ["index_build_failed", "model_not_found"]
    assert (taken["error"]["code"], count, len(sent)) == ("name_taken", 3, 4)
    assert again["state"] == "ready"
    assert kept() == before


def test_an_upload_stays_where_its_build_may_go_on(
    served: Open, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stops waiting does not stop the build, which has yet to read the file."""
    place = flags("server", served, tmp_path, monkeypatch)
    removed: list[Any] = []
    monkeypatch.setattr(Files, "delete", lambda *given: removed.append(given))

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionFailed("gone")

    monkeypatch.setattr(_index_doors.ServerDoor, "_followed", lost)
    code = main(["index", "build", "long", file, *place, *encoder(place, served)])
    built = served.built("long")
    told(capsys, "rm", "long", *place)

    assert (code != 0, removed, built["state"]) == (True, [], "ready")


def test_E3_a_folder_finds_what_a_server_finds(
    served: Open, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same passages with the same scores, by every way of searching, and the encoder has the same digest."""
    ids: dict[str, list[Any]] = {}
    scores: dict[str, list[float]] = {}
    for kind in ("server", "folder"):
        place = flags(kind, served, tmp_path, monkeypatch)
        ids[kind] = [told(capsys, "build", "both", file, *place, *encoder(place, served))["model_digest"]]
        scores[kind] = []
        for mode in ("dense", "bm25", "hybrid"):
            hits = told(capsys, "search", "both", QUESTION, *place, "--mode", mode)["results"][0]["passages"]
            ids[kind] += [hit["id"] for hit in hits]
            scores[kind] += [hit["score"] for hit in hits]
        told(capsys, "rm", "both", *place)

    assert ids["server"] == ids["folder"]
    assert scores["server"] == pytest.approx(scores["folder"], abs=1e-6)


def test_R11_each_bad_line_is_a_line_of_the_message(
    served: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its file's name, also where a server has read it. Inverses seen: both in one line; the upload's id."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n[]\n")
    found = {}
    for where in ("folder", "server"):
        place = flags(where, served, tmp_path, monkeypatch)
        capsys.readouterr()
        assert main(["index", "build", "lined", str(bad), *place, *encoder(place, served)]) == 2
        lines = capsys.readouterr().err.splitlines()
        found[where] = [line[line.index("bad.jsonl:") :] for line in lines if "bad.jsonl:" in line]
    told(capsys, "rm", "lined", *place)

    assert [line.partition(" ")[0] for line in found["folder"]] == ["bad.jsonl:1", "bad.jsonl:2"]
    assert found["server"] == found["folder"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "x", "none.jsonl", "--dir", "d"], "FILE must be a readable file of passages. Given: none.jsonl"),
        (["search", "x", "q", "--dir", "d"], 'index "x" does not exist'),
        (["search", "x", "q", "--dir", "d", "--url", "http://127.0.0.1:1"], "Give one of the two"),
        (["refresh", "x", "--dir", "d"], 'index "x" does not exist'),
        (["rm", "../x", "--dir", "d"], "must have 1 to 64 letters"),
        (["search", "x", "--dir", "d"], "required: QUESTION"),
        (["build", "x", "here.jsonl", "--dir", "d", "--model", "./nowhere"], "--model must be an encoder"),
        (["build", "x", "bad.jsonl", "--dir", "d"], "bad.jsonl:1 must have the field"),
    ],
)
def test_R11_wrong_input_is_a_sentence(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')

    assert main(["index", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list((tmp_path / "d").glob("*")) == []
