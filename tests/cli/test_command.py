"""The command: fast help, examples that run, wrong input answered in a sentence, exit codes."""

from __future__ import annotations

import importlib
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, contract, http_server, refusal

from trilithon import errors
from trilithon.cli import main
from trilithon.cli._main import VERBS
from trilithon.cli._output import exit_code
from trilithon.cli._parser import Parser

# They start processes, reach the network or need files; their own tests run them.
PARSED_ONLY = ("serve", "pull", "data", "pretrain", "finetune", "checkpoint", "index", "synth-qa", "story")


def _parser(verb: str) -> Parser:
    parser = Parser(prog=f"trilithon {verb}")
    importlib.import_module(f"trilithon.cli.{verb.replace('-', '_')}").add_arguments(parser)
    return parser


def _parsers(parser: Parser) -> Iterator[Parser]:
    yield parser
    for action in parser.actions():
        yield from _parsers(action)


def _examples() -> list[str]:
    lines = []
    for verb in VERBS:
        for parser in _parsers(_parser(verb)):
            found = (parser.epilog or "").splitlines()
            lines += [line.strip() for line in found if line.startswith("  trilithon ")]
    return list(dict.fromkeys(lines))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Scripted]:
    """A server of the contract that the environment names, and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    with http_server() as scripted:
        scripted.answer = contract
        monkeypatch.setenv("TRILITHON_URL", scripted.url)
        yield scripted


def test_help_is_fast() -> None:
    """`trilithon --help` takes under 300 ms of processor time and loads nothing heavy."""
    code = (
        "import sys, time; from trilithon.cli import main; main(['--help'])\n"
        "heavy = [name for name in ('torch', 'numpy', 'grpc', 'httpx', 'pydantic', 'rich') if name in sys.modules]\n"
        "print(heavy, time.process_time(), file=sys.stderr)"
    )

    # The least of three: other work on the machine only ever adds.
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    loaded, times = zip(*(run.stderr.rsplit(" ", 1) for run in runs), strict=True)

    assert set(loaded) == {"[]"}
    assert min(map(float, times)) < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_parser_ends_with_examples(verb: str) -> None:
    """Help of every verb, and of every action that has flags, ends with examples."""
    for parser in _parsers(_parser(verb)):
        if parser.prog.count(" ") == 1 or len(parser._actions) > 2:
            assert parser.epilog is not None, parser.prog
            assert f"  {' '.join(parser.prog.split()[:2])}" in parser.epilog


@pytest.mark.usefixtures("smollm2_dir")  # examples name it
@pytest.mark.parametrize("example", _examples())
def test_examples_run(
    example: str, server: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example of each help text runs; those that start servers or download are parsed."""
    verb, *arguments = shlex.split(example)[1:]
    if verb in PARSED_ONLY:
        _parser(verb).parse(arguments)
        return
    if "compare" in arguments:
        for name in ("before.json", "after.json"):
            assert main(["bench", "serve", "--requests", "2", "--answer-len", "2", "--runs", "1", "--save", name]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\n/quit\n"))

    code = main([verb, *arguments])

    out = capsys.readouterr()
    assert code in ((0, 3, 7) if verb in ("doctor", "config") else (0,)), out.err
    assert out.out or code == 3
    if "json" in arguments:
        assert json.loads(out.out) is not None


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["serv"], 2, "unknown verb 'serv'. Did you mean 'serve'?"),
        (["--vresion"], 2, "unknown flag '--vresion'"),
        (["generate", "a", "--temprature", "1"], 2, "unknown flag '--temprature'. Did you mean '--temperature'?"),
        (["generate", "a", "--max-tokens", "many"], 2, "argument --max-tokens: invalid int value: 'many'."),
        (["generate", "a", "-o", "jsn"], 2, "Did you mean 'json'?"),
        (["generate", "a", "--param", "topk=3"], 2, "--param knows no 'topk'. Did you mean 'top_k'?"),
        (["generate", "a", "--param", "top_k=a"], 2, "--param top_k must be JSON"),
        (["generate", "a", "--top-k", "1", "--param", "top_k=2"], 2, "also given as --top-k"),
        (["generate", "a", "--regex", "a", "--choice", "b"], 2, "only one of --json-schema, --regex"),
        (["generate", "a", "--grammar", "no.lark"], 2, "--grammar must be a readable text file. Given: no.lark"),
        (["generate", "a", "--api-key-file", "none"], 2, "--api-key-file must be a readable text file"),
        (["generate", "a", "--url", "ftp://x"], 2, "`url` must start with one of"),
        (["generate", "a", "--timeout", "0"], 2, "argument --timeout: invalid seconds value: '0'"),
        (["chat", "a", "--n", "2"], 2, "one answer at a time"),
        (["tokenize", "--decode", "a"], 2, "--decode takes token ids. Given: 'a'"),
        (["score", "a"], 2, "required: continuation"),
        (["bench"], 2, "required: ACTION"),
        (["bench", "serv"], 2, "Did you mean 'serve'?"),
        (["bench", "serve", "--rate", "1", "--concurrency", "1"], 2, "not allowed with argument"),
        (["bench", "serve", "--slo", "x=1"], 2, "--slo must be one of ttft_ms"),
        (["bench", "serve", "--extra-body", "[]"], 2, "--extra-body must be a JSON object"),
        (["bench", "serve", "--shared-prefix", "200"], 2, "--shared-prefix must be from 0 to --prompt-len"),
        (["bench", "compare", "no.json", "no.json"], 2, "no.json must be a result of"),
        (["models", "--url", "http://127.0.0.1:1", "--timeout", "1"], 5, "Nothing answered at http://127.0.0.1:1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_R11_wrong_input_is_a_sentence(
    arguments: list[str], code: int, sentence: str, server: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong input gives one sentence on stderr, nothing on stdout, and the documented exit code."""
    assert main(arguments) == code

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("trilithon: ")
    assert sentence in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgument("x"), 2),
        (errors.NotFound("x"), 2),
        (errors.Internal("x"), 1),
        (errors.ProtocolError("x"), 1),
        (errors.DataLoss("x"), 3),
        (errors.Overloaded("x"), 5),
        (errors.Unavailable("x", code="draining"), 5),
        (errors.ConnectionFailed("x"), 5),
        (errors.Unavailable("x", code="engine_lost"), 6),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_exit_codes(error: errors.TrilithonError, code: int) -> None:
    """Each class of trouble has its exit code."""
    assert exit_code(error) == code


def test_server_errors_show_every_violation(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """All that a request got wrong is said, with its id; with -o json as JSON."""
    details = [
        errors.Violation(field="top_p", code="invalid_value", message="`top_p` must be at most 1. Given: 2."),
        errors.Violation(field="seed", code="invalid_value", message="`seed` must be a whole number. Given: \x1b[2J."),
    ]
    server.answer = lambda asked: refusal(
        errors.InvalidArgument(details[0].message, details=details, request_id="req_9")
    )

    assert main(["generate", "a", "--no-stream"]) == 2
    text = capsys.readouterr().err
    assert main(["generate", "a", "-o", "json"]) == 2
    described = json.loads(capsys.readouterr().err)["error"]

    assert "`top_p` must be" in text
    assert "`seed` must be" in text
    assert "\x1b" not in text
    assert "req_9" in text
    assert (described["type"], described["request_id"]) == ("InvalidArgument", "req_9")


@pytest.mark.parametrize(
    ("arguments", "is_json"),
    [
        (["--format", "json"], True),  # what the server says
        (["--format=json", "-o", "out.json"], True),
        (["--format", "json", "--format", "text"], False),
        (["-o", "json"], False),
        (["--output=json", "--format", "text"], False),
        (["--batch", "0", "--format", "json"], True),  # what the verb finds
        (["--batch", "0", "-o", "json"], False),
        (["--batch", "x", "--format", "json"], True),  # what the parser finds
        (["--batch", "x", "--format=json"], True),
        (["--batch", "x", "-o", "json"], False),
        (["--batch", "x", "-ojson"], False),
        (["--bath", "--format", "json"], True),
    ],
)
def test_errors_are_json_where_the_verb_prints_json(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], is_json: bool
) -> None:
    """
    Where `-o` is the file that is written, `--format` decides, whoever finds the error. Inverse seen red: `-o json`
    looked for in the words of the command alone.
    """
    (tmp_path / "corpus.jsonl").write_text('{"text": "Ada."}\n')
    server.answer = lambda asked: refusal(errors.NotFound("no model.", code="model_not_found"))
    output = [] if any(word.startswith(("-o", "--output")) for word in arguments) else ["-o", "out.json"]

    assert main(["synth-qa", "corpus.jsonl", *output, *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith('{"error": ') == is_json
    assert told.startswith("trilithon: ") == (not is_json)


@pytest.mark.parametrize(
    ("arguments", "is_json"),
    [
        (["generate", "a", "-o", "json", "--n", "x"], True),
        (["generate", "a", "-ojson", "--n", "x"], True),
        (["generate", "a", "--nn", "x", "--output=json"], True),
        (["generate", "json", "--n", "x"], False),
        (["data", "info", "a", "-o", "json", "--bogus"], True),
        (["data", "inf", "a", "-o", "json"], True),
        (["data", "convert", "squad", "a.json", "-o", "json", "--bogus"], False),
        (["gnrate", "a", "-o", "json"], True),
    ],
)
def test_errors_of_a_command_line_are_json_where_it_asks_for_json(
    capsys: pytest.CaptureFixture[str], arguments: list[str], is_json: bool
) -> None:
    """Also where its arguments could not be parsed: then the flags of its verb tell."""
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith('{"error": ') == is_json


def test_flags_become_parameters(server: Scripted, tmp_path: Path) -> None:
    """Every flag reaches the request under its API name; --param reaches the rest."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')

    main(
        ["generate", "Once", "-o", "json", "--top-k", "3", "--stop", "a", "--stop", "b", "--seed", "7", "--n", "2",
         "--json-schema", str(schema), "--ignore-eos", "--param", 'metadata={"a": "b"}', "--model", "m"]
    )  # fmt: skip

    assert server.asked[0].body == {
        "prompt": "Once",
        "top_k": 3,
        "stop": ["a", "b"],
        "seed": 7,
        "n": 2,
        "constraint": {"json_schema": '{"type": "object"}'},
        "ignore_eos": True,
        "metadata": {"a": "b"},
        "model": "m",
    }


def test_key_comes_from_file_or_environment(server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is never on the command line; the file wins over the environment."""
    monkeypatch.setenv("TRILITHON_API_KEY", "from-environment")
    file = tmp_path / "key"
    file.write_text("from-file\n")

    main(["models", "--served"])
    main(["models", "--served", "--api-key-file", str(file)])

    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer from-environment", "Bearer from-file"]


def test_chat_keeps_the_conversation(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each turn is sent with all before it; /reset forgets, the system message stays."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\nthree\n"))

    assert main(["chat", "--system", "be brief"]) == 0

    roles = [[message["role"] for message in asked.body["messages"]] for asked in server.asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert capsys.readouterr().out.count("a time") == 3


def test_conversations_are_text(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversation has no JSON form, which is said as JSON."""
    assert main(["chat", "-o", "json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["message"].startswith("-o json needs a MESSAGE")


def test_interrupt_is_130(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with exit code 130 and no traceback."""

    def interrupted(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("trilithon.cli.version.run", interrupted)

    assert main(["version"]) == 130


def test_closed_pipe_is_quiet() -> None:
    """`trilithon --help | head -0` ends without a complaint."""
    code = "import sys; from trilithon.cli import main; sys.exit(main(['version']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        complaint = process.stderr.read()

    assert process.wait(30) == 0
    assert complaint == b""


def test_doctor_fails_with_7(server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A keys file that others can read is a failed check, with the command that mends it."""
    keys = tmp_path / "keys"
    keys.write_text("k")
    keys.chmod(0o644)

    code = main(["doctor", "--api-keys-file", str(keys)])

    assert code == 7
    assert f"chmod 600 {keys}" in capsys.readouterr().out


def test_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the serve extra, `serve` is one sentence and exit code 2."""
    monkeypatch.setattr("trilithon.cli._extra.find_spec", lambda name: None)

    assert main(["serve", "m"]) == 2
    assert "pip install 'trilithon[serve]'" in capsys.readouterr().err


def test_progress_is_plain_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal progress is whole lines on stderr, rarely; stdout stays clean."""
    from trilithon.cli._output import Progress

    started = time.monotonic()
    with Progress("counting", total=1000) as progress:
        for done in range(1000):
            progress.update(done, what="adding", total=1000)
    lines = capsys.readouterr()

    assert lines.out == ""
    assert lines.err.splitlines()[0] == "adding: 0 of 1000"
    assert len(lines.err.splitlines()) <= 1 + (time.monotonic() - started) / Progress.EVERY_S + 1
