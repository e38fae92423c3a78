"""`trilithon data convert`: published data sets as rows of the finetuning tasks, cut into train.jsonl and dev.jsonl."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trilithon.cli import _extra
from trilithon.cli._output import EXIT_INVALID_DATA, EXIT_OK, explain, print_json, print_table, printable
from trilithon.cli._parser import Parser, UsageError, nearest

MAX_BYTES = 1 << 30
"""Of a file, expanded: it is read whole."""


MAX_WINDOW = 1 << 31
"""Of zstandard: dumps of comments are packed with it."""


def add(parser: Parser) -> None:
    """Add what the action takes."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="the form of the file; --list tells them all")
    parser.add_argument(
        "input",
        nargs="*",
        type=Path,
        metavar="IN",
        help="the published files, most often one; .gz and .zst are expanded",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where train.jsonl and dev.jsonl are written")
    parser.add_argument("--list", action="store_true", help="list the forms, and the task that each is for")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print [text]")
    parser.add_examples(
        "trilithon data convert --list",
        "trilithon data convert squad dev-v2.0.json -o squad",
        "trilithon data convert conll train.tsv -o entities",
        "trilithon data convert pushshift RC_2019-01.zst blocked.txt -o conversations",
    )


def run(args: argparse.Namespace) -> int:
    """Convert; a file of another form is exit code 3."""
    converters = _extra.load("trilithon_finetune.converters", verb="data convert", extra="engine")
    if args.list:
        return _list(converters, as_json=args.format == "json")
    missing = [name for name in ("name", "input", "output") if not getattr(args, name)]
    if missing:
        words = {"name": "NAME", "input": "IN", "output": "-o DIR"}
        needed = ", ".join(words[name] for name in missing)
        raise UsageError(f"data convert needs {needed}. See `trilithon data convert --help`.")
    if args.name not in converters.CONVERTERS:
        known = ", ".join(converters.CONVERTERS)
        near = nearest(args.name, converters.CONVERTERS)
        raise UsageError(f"NAME must be one of {known}. Given: {args.name!r}.{near}")
    documents = [_read(path) for path in args.input]
    told = ", ".join(path.name for path in args.input)
    try:
        split = converters.convert(args.name, *documents)
    except ValueError as error:
        return explain(ValueError(f"{told}: {error}"), EXIT_INVALID_DATA, as_json=args.format == "json")
    reading = _extra.load("trilithon_finetune.data.findings", verb="data convert", extra="engine")
    findings = [dataclasses.replace(item, file=args.input[0].name) for item in split.findings]
    lines = [reading.line_form(item) for item in findings]
    counts = {name: len(rows) for name, rows in (("train", split.train), ("dev", split.dev)) if rows}
    if not counts:
        nothing = ValueError(" ".join([f"{told} holds no rows.", *lines[:1]]))
        return explain(nothing, EXIT_INVALID_DATA, as_json=args.format == "json")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in counts:
        _write(args.output / f"{name}.jsonl", getattr(split, name))
    task = converters.CONVERTERS[args.name].task
    if args.format == "json":
        done = {"task": task, "rows": counts, "dropped": split.dropped, "directory": str(args.output)}
        print_json({**done, "findings": findings})
        return EXIT_OK
    for line in lines:
        print(printable(line))
    for name, count in counts.items():
        print(f"{args.output / name}.jsonl: {count:,} rows for the task {task}")
    for reason, count in split.dropped.items():
        print(f"Left out: {count:,} {reason}")
    first = args.output / f"{next(iter(counts))}.jsonl"
    print(f"Look at it with: trilithon finetune validate {first} --model MODEL --task {task}")
    return EXIT_OK


def _list(converters: ModuleType, *, as_json: bool) -> int:
    known = converters.CONVERTERS.items()
    if as_json:
        print_json({name: {"task": item.task, "about": item.about} for name, item in known})
    else:
        print_table(("name", "task", "reads"), [(name, item.task, item.about) for name, item in known])
    return EXIT_OK


def _read(path: Path) -> bytes:
    """The file, expanded. Raises UsageError."""
    try:
        document = _begin(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"IN must be a readable file. Given: {path} ({error}).") from None
    if len(document) > MAX_BYTES:
        raise UsageError(f"IN must have at most {MAX_BYTES >> 20} MiB. Given: {path}.")
    return document


def _begin(path: Path) -> bytes:
    """A byte more than may be read, where there is so much. Raises OSError, EOFError, zlib.error."""
    if path.suffix != ".zst":
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    zstandard = _extra.load("zstandard", verb="data convert", extra="engine")
    try:
        with zstandard.open(path, dctx=zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)) as stream:
            return bytes(stream.read(MAX_BYTES + 1))
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
    part.replace(path)
