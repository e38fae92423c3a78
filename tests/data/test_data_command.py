"""`trilithon data`: each action from the command line, its examples, and what a wrong line is told."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon.cli import data
from trilithon.cli._parser import Parser, UsageError

TEXT = "\n".join(f"the old mason set {i} stones upright and laid {i * i} across them" for i in range(400))


def _parser() -> Parser:
    parser = Parser(prog="trilithon data")
    data.add_arguments(parser)
    return parser


def run(*arguments: object) -> int:
    """The exit code of `trilithon data ARGUMENTS...`."""
    return data.run(_parser().parse([str(argument) for argument in arguments]))


@pytest.fixture
def rows(write_rows: Callable[..., Path]) -> Path:
    """Three documents, one of them empty."""
    return write_rows("texts.jsonl", ["the first", "", "the second one"])


def test_prepare_says_what_it_wrote(
    rows: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts for people, and all fields as JSON."""
    assert run("prepare", rows, "--tokenizer", tokenizer_dir, "--output", tmp_path / "a") == 0
    assert "a: 2 documents (1 empty ones left out)," in capsys.readouterr().out
    assert (
        run("prepare", rows, "--tokenizer", tokenizer_dir, "--output", tmp_path / "b", "--no-append-eod", "-o", "json")
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["eod_id"] is None
    assert (printed["num_documents"], printed["num_empty"], printed["dtype"]) == (2, 1, "uint16")


def test_info_shows_counts_and_text(
    rows: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts, lengths, digests, how the documents begin; a changed file is found by its SHA-256."""
    run("prepare", rows, "--tokenizer", tokenizer_dir, "--output", tmp_path / "c")
    capsys.readouterr()

    assert run("info", tmp_path / "c", "--tokenizer", tokenizer_dir, "--verify", "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 2
    assert found["document_tokens"]["min"] < found["document_tokens"]["max"]
    assert found["verified"] is True
    assert found["peek"] == ["the first<|im_end|>", "the second one<|im_end|>"]
    content = bytearray((tmp_path / "c.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "c.bin").write_bytes(content)
    assert run("info", tmp_path / "c", "--verify") == 7
    assert "NOT as recorded" in capsys.readouterr().out


def test_tokenizer_then_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vocabulary trained on a text prepares that text."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    assert run("tokenizer", tmp_path / "text.txt", "--output", tmp_path / "tok", "--vocab-size", 380) == 0
    assert "380 ids from 1 documents" in capsys.readouterr().out
    assert run("prepare", tmp_path / "text.txt", "--tokenizer", tmp_path / "tok", "--output", tmp_path / "c") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "c", "--tokenizer", tmp_path / "tok") == 0
    assert "  0: the old mason set 0 stones" in capsys.readouterr().out


def test_another_tokenizer_is_refused(write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    """Text is only shown by the tokenizer that made the file."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run("tokenizer", tmp_path / "text.txt", "--output", tmp_path / "tok", "--vocab-size", 380)
    run("prepare", write_rows("a.jsonl", ["a"]), "--tokenizer", tokenizer_dir, "--output", tmp_path / "c")

    with pytest.raises(UsageError, match="--tokenizer must be the one that made"):
        run("info", tmp_path / "c", "--tokenizer", tmp_path / "tok")


def test_R11_bad_rows_have_a_line_each(
    write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3; on stderr a line per finding, safe for a terminal; as JSON one document."""
    rows = write_rows("bad.jsonl", [b'{"text": 1}', b"\x1b[31m"])
    arguments = ("prepare", rows, "--tokenizer", tokenizer_dir, "--output", tmp_path / "c")

    assert run(*arguments) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "\x1b" not in printed.err
    lines = printed.err.splitlines()
    assert lines[0] == "trilithon: the input has 2 findings:"
    assert lines[1] == f"trilithon: {rows}:1 text must be a string. Given: '1'."
    assert lines[-1] == "trilithon: Nothing was written. Repair or leave out these rows."
    assert run(*arguments, "-o", "json") == 3
    assert "findings" in json.loads(capsys.readouterr().err)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("prepare x.txt --output c", "required: --tokenizer"),
        ("prepare x.txt --tokenizer {tok} --output c --workers 0", "must be at least 1. Given: 0"),
        ("prepare x.txt --tokenizer {tok} --output c --workers x", "invalid count value"),
        ("prepare x.txt --tokenizer {tok} --output c --no-append-eod --eod a", "--eod goes with --append-eod only"),
        ("tokenizer x.txt --output tok --vocab-size 400 --kind bpee", "Did you mean 'bpe'?"),
        ("prepar", "Did you mean 'prepare'?"),
        ("", "required: ACTION"),
    ],
)
def test_R11_wrong_lines_are_sentences(arguments: str, sentence: str, tokenizer_dir: Path) -> None:
    """Wrong flags are told what is allowed."""
    with pytest.raises(UsageError) as raised:
        run(*arguments.format(tok=tokenizer_dir).split())

    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("info none", 2, "none.idx cannot be read"),
        ("prepare none.txt --tokenizer {tok} --output c", 3, "none.txt is not a file."),
        ("prepare none.txt --tokenizer {tok}/tokenizer_config.json --output c", 3, "none.txt is not a file."),
        ("tokenizer none.txt --output tok --vocab-size 12", 2, "vocab_size must be at least 355"),
    ],
)
def test_R11_wrong_values_are_sentences(
    arguments: str, code: int, sentence: str, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong values end with 2, wrong data with 3."""
    assert run(*arguments.format(tok=tokenizer_dir).split()) == code

    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err


def test_examples_run(
    smollm2_dir: Path,
    minilm_dir: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every example of the help runs, where the texts that it names are."""
    monkeypatch.chdir(tmp_path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c + d for a in letters for b in "aeiou" for c in letters for d in ("n", "st", "ing")]
    for name in ("texts.jsonl", "abstracts.jsonl"):
        write_rows(name, [" ".join(words[i::40]) for i in range(40)])
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    parsers = [_parser(), *_parser().actions()]
    lines = [line.strip() for p in parsers for line in (p.epilog or "").splitlines() if line.startswith("  trilithon ")]
    ours = [line for line in set(lines) if line.split()[2] not in ("convert", "stories")]  # run elsewhere
    examples = sorted(ours, key=lambda line: ["tokenizer", "prepare", "info", "fragmentation"].index(line.split()[2]))

    assert len(examples) == 7
    for example in examples:
        # The texts of this test are too few for a vocabulary of that size.
        example = example.replace("32000", "2000").replace("8000", "2000")
        assert run(*shlex.split(example)[2:]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
