"""
`trilithon synth-qa`: questions and answers made from a corpus, or from passages that a model writes, as a file that a
reader is finetuned on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trilithon import Client, SynthQAOptions
from trilithon.cli import _local_server
from trilithon.cli import _synth_qa_passages as passages
from trilithon.cli import _synth_qa_run as runs
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import EXIT_INVALID_DATA, EXIT_OK, Progress, explain, print_json, printable
from trilithon.cli._parser import Parser, UsageError
from trilithon.cli._part_file import PartFile, ResumeError
from trilithon.cli._synth_qa_run import CorpusError, Document, squad
from trilithon.errors import TrilithonError

T = TypeVar("T")

CALL_S = 600.0
"""Of one request, unless `--timeout` says."""


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("corpus", type=Path, nargs="?", metavar="CORPUS", help='JSON lines {"text", "id"?, "title"?}')
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the SQuAD file to write")
    parser.add_argument("--answers", type=int, default=5, metavar="N", help="answers of a passage, at most [5]")
    parser.add_argument("--questions", type=int, default=2, metavar="N", help="questions about an answer [2]")
    parser.add_argument(
        "--unanswerable", type=int, default=0, metavar="N", help="also questions without an answer: SQuAD 2.0 [0]"
    )
    parser.add_argument(
        "--filter", choices=("pair_any", "single", "none"), default="pair_any", help="what is kept [pair_any]"
    )
    parser.add_argument("--answer-model", default="", metavar="NAME", help="proposes answers [the first that can]")
    parser.add_argument("--reader-model", default="", metavar="NAME", help="checks questions [the first that can]")
    parser.add_argument("--generate", type=int, metavar="N", help="write N passages in place of a corpus")
    parser.add_argument("--titles", type=Path, metavar="FILE", help="of the passages to write, one a line")
    parser.add_argument("--passage-model", default="", metavar="NAME", help="writes passages [--model]")
    parser.add_argument("--passage-tokens", type=int, default=320, metavar="N", help="of a passage, at most [320]")
    parser.add_argument("--min-words", type=int, default=50, metavar="N", help="of a passage that is kept [50]")
    parser.add_argument("--seed", type=int, default=1, help="repeats the run [1]")
    parser.add_argument("--temperature", type=float, metavar="X", help="of the questions [1]")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest [40, every second question]")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from this nucleus [0.9, the others]")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="passages of a request, 1 to 64 [8]")
    parser.add_argument("--restart", action="store_true", help="leave an interrupted run aside")
    parser.add_argument(
        "--local", action="append", default=[], metavar="[NAME=]MODEL",
        help="serve this model for the run, in place of a server; repeat it for each part",
    )  # fmt: skip
    parser.add_argument("--dtype", metavar="TYPE", help="of --local models [as `trilithon serve` chooses]")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print the summary [text]")
    add_server_arguments(parser)
    parser.add_examples(
        "trilithon synth-qa corpus.jsonl -o made.json",
        "trilithon synth-qa corpus.jsonl -o made.json --local smollm2-135m-instruct --filter none",
        "trilithon synth-qa corpus.jsonl -o made.json --filter single --answers 8 --batch 16",
        "trilithon synth-qa --generate 200 --titles titles.txt -o made.json --passage-model smollm2-135m-instruct",
    )


@dataclass(frozen=True)
class _Made:
    """What a run has made: of which corpus, and of which passages that it wrote itself, if it did."""

    corpus: list[Document]
    kept: runs.Kept
    sieved: passages.Sieved | None = None
    written: PartFile | None = None


def run(args: argparse.Namespace) -> int:
    """Ask about the corpus, write the file, say what became of the questions. A broken corpus is exit code 3."""
    _check(args)
    # Told to the server: it ends a request in time, with whole passages, and the next request goes on from there.
    args.timeout = args.timeout or CALL_S
    as_json = args.format == "json"
    try:
        made = _asked(args) if args.generate is None else _generated(args)
    except CorpusError as error:
        return explain(error, EXIT_INVALID_DATA, as_json=as_json)
    except ResumeError as error:
        raise UsageError(str(error)) from None
    part = args.output.with_name(f".{args.output.name}.new")
    document = squad(made.corpus, made.kept.triples, with_impossible=args.unanswerable > 0)
    part.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(args.output)
    for file in (made.kept.file, made.written):
        if file is not None:
            file.path.unlink()
    _tell(args.output, made, as_json=as_json)
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.batch <= runs.MAX_PASSAGES:
        raise UsageError(f"--batch must be from 1 to {runs.MAX_PASSAGES}. Given: {args.batch}.")
    if args.local and args.url:
        raise UsageError("--local and --url must not both be given.")
    if (args.corpus is None) == (args.generate is None):
        raise UsageError("give either a CORPUS, or --generate N with --titles FILE.")
    if (args.titles is None) != (args.generate is None):
        raise UsageError("--generate and --titles must be given together.")
    for flag, value in (
        ("generate", args.generate),
        ("min-words", args.min_words),
        ("passage-tokens", args.passage_tokens),
    ):
        if value is not None and value < 1:
            raise UsageError(f"--{flag} must be at least 1. Given: {value}.")


def _asked(args: argparse.Namespace) -> _Made:
    """About a corpus that is there."""
    corpus = _readable("CORPUS", args.corpus, runs.read_corpus)
    kept = runs.Kept(args.output, corpus, _settings(args), restart=args.restart)
    with Progress("passages", total=len(corpus)) as progress, _client(args) as client:
        _ask(args, client, corpus, kept, progress)
    return _Made(corpus, kept)


def _generated(args: argparse.Namespace) -> _Made:
    """About passages that are written first."""
    writing = passages.Writing(
        titles=_readable("--titles", args.titles, passages.read_titles),
        count=args.generate,
        seed=args.seed,
        model=args.passage_model or args.model or "",
        tokens=args.passage_tokens,
        words=args.min_words,
    )
    written = passages.kept_passages(args.output, writing, restart=args.restart)
    with Progress("passages written", total=writing.count) as progress, _client(args) as client:
        with _goes_on(written.path, lambda: len(written.pieces), writing.count):
            texts = passages.write_passages(client, writing, written, args.batch, progress.update)
        sieved = passages.sieve(texts, writing)
        if not sieved.corpus:
            why = ", ".join(f"{count} {passages.REASONS[reason]}" for reason, count in sieved.dropped.items())
            raise CorpusError(f"none of the {writing.count} passages can be asked about: {why}.")
        kept = runs.Kept(args.output, sieved.corpus, _settings(args), restart=args.restart)
        progress.update(0, what="passages", total=len(sieved.corpus))
        _ask(args, client, sieved.corpus, kept, progress)
    return _Made(sieved.corpus, kept, sieved, written)


def _ask(
    args: argparse.Namespace, client: Client, corpus: Sequence[Document], kept: runs.Kept, progress: Progress
) -> None:
    progress.update(len(kept.triples))
    with _goes_on(kept.file.path, lambda: len(kept.triples), len(corpus)):
        runs.work(client, corpus, kept, _settings(args), args.batch, progress.update)


@contextlib.contextmanager
def _goes_on(path: Path, done: Callable[[], int], total: int) -> Iterator[None]:
    """An error of the server says what is kept, and how to go on."""
    try:
        yield
    except TrilithonError as error:
        if done():
            told = f"{done()} of {total} passages are kept in {path.name}: run the command again to go on."
            error.hint = f"{error.hint} {told}".strip()
        raise


def _readable(name: str, path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} must be a readable text file. Given: {path} ({error}).") from None


def _settings(args: argparse.Namespace) -> runs.Settings:
    draw: SynthQAOptions = {}
    if args.temperature is not None:
        draw["temperature"] = args.temperature
    if args.top_k is not None:
        draw["top_k"] = args.top_k
    if args.top_p is not None:
        draw["top_p"] = args.top_p
    return runs.Settings(
        seed=args.seed,
        answers=args.answers,
        questions=args.questions,
        unanswerable=args.unanswerable,
        filter=args.filter,
        model=args.model or "",
        answer_model=args.answer_model,
        reader_model=args.reader_model,
        draw=draw,
    )


@contextlib.contextmanager
def _client(args: argparse.Namespace) -> Iterator[Client]:
    if not args.local:
        with connect(args) as client:
            yield client
        return
    with _local_server.serving(args.local, dtype=args.dtype) as url, Client(url, timeout=args.timeout) as client:
        yield client


def _tell(output: Path, made: _Made, *, as_json: bool) -> None:
    told, sieved = runs.summary(made.kept.triples), made.sieved
    if as_json:
        models = {**(made.written.models or {} if made.written is not None else {}), **(made.kept.file.models or {})}
        written = {} if sieved is None else {"generated": {"kept": len(sieved.corpus), "dropped": sieved.dropped}}
        print_json({"output": str(output), "models": models, **written, **told})
        return
    if sieved is not None:
        print(
            f"{len(sieved.corpus) + sum(sieved.dropped.values()):,} passages were written, {len(sieved.corpus):,} kept"
        )
        for reason, count in sieved.dropped.items():
            print(f"Dropped: {count:,} {passages.REASONS[reason]}")
    print(
        f"{output}: {told['kept']:,} of {told['questions']:,} questions about {told['passages']:,} passages were kept"
    )
    for reason, count in told["dropped"].items():
        print(f"Dropped: {count:,} {runs.REASONS[reason]}")
        for item in told["examples"][reason]:
            found = f" -> {item['qa_answer']!r}" if item["qa_answer"] else ""
            print(printable(f"  {item['answer']!r}: {item['question']!r}{found}"))
