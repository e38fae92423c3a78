"""`trilithon synth-qa`: questions and answers made from a corpus, as a file that a reader is finetuned on."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from trilithon import Client, SynthQAOptions
from trilithon.cli import _local_server
from trilithon.cli import _synth_qa_run as runs
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import EXIT_INVALID_DATA, EXIT_OK, Progress, explain, print_json, printable
from trilithon.cli._parser import Parser, UsageError
from trilithon.errors import TrilithonError

CALL_S = 600.0
"""Of one request, unless `--timeout` says."""


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help='JSON lines {"text", "id"?, "title"?}')
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the SQuAD 1.1 file to write")
    parser.add_argument("--answers", type=int, default=5, metavar="N", help="answers of a passage, at most [5]")
    parser.add_argument("--questions", type=int, default=2, metavar="N", help="questions about an answer [2]")
    parser.add_argument(
        "--filter", choices=("pair_any", "single", "none"), default="pair_any", help="what is kept [pair_any]"
    )
    parser.add_argument("--answer-model", default="", metavar="NAME", help="proposes answers [the first that can]")
    parser.add_argument("--reader-model", default="", metavar="NAME", help="checks questions [the first that can]")
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
    )


def run(args: argparse.Namespace) -> int:
    """Ask about the corpus, write the file, say what became of the questions. A broken corpus is exit code 3."""
    if not 1 <= args.batch <= runs.MAX_PASSAGES:
        raise UsageError(f"--batch must be from 1 to {runs.MAX_PASSAGES}. Given: {args.batch}.")
    if args.local and args.url:
        raise UsageError("--local and --url must not both be given.")
    # Told to the server: it ends a request in time, with whole passages, and the next request goes on from there.
    args.timeout = args.timeout or CALL_S
    as_json = args.format == "json"
    settings = _settings(args)
    try:
        corpus = runs.read_corpus(args.corpus)
        kept = runs.Kept(args.output, corpus, settings, restart=args.restart)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"CORPUS must be a readable text file. Given: {args.corpus} ({error}).") from None
    except runs.CorpusError as error:
        return explain(error, EXIT_INVALID_DATA, as_json=as_json)
    except runs.ResumeError as error:
        raise UsageError(str(error)) from None
    try:
        with Progress("passages", total=len(corpus)) as progress, _client(args) as client:
            progress.update(len(kept.triples))
            runs.work(client, corpus, kept, settings, args.batch, progress.update)
    except runs.ResumeError as error:
        raise UsageError(str(error)) from None
    except TrilithonError as error:
        if kept.triples:
            done = f"{len(kept.triples)} of {len(corpus)} passages are kept in {kept.path.name}"
            error.hint = f"{error.hint} {done}: run the command again to go on.".strip()
        raise
    part = args.output.with_name(f".{args.output.name}.new")
    part.write_text(json.dumps(runs.squad(corpus, kept.triples), ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(args.output)
    kept.path.unlink()
    _tell(args.output, kept, as_json=as_json)
    return EXIT_OK


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


def _tell(output: Path, kept: runs.Kept, *, as_json: bool) -> None:
    told = runs.summary(kept.triples)
    if as_json:
        print_json({"output": str(output), "models": kept.models, **told})
        return
    print(
        f"{output}: {told['kept']:,} of {told['questions']:,} questions about {told['passages']:,} passages were kept"
    )
    for reason, count in told["dropped"].items():
        print(f"Dropped: {count:,} {runs.REASONS[reason]}")
        for item in told["examples"][reason]:
            found = f" -> {item['qa_answer']!r}" if item["qa_answer"] else ""
            print(printable(f"  {item['answer']!r}: {item['question']!r}{found}"))
