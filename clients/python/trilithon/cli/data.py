"""`trilithon data`: texts to token files, vocabularies from texts, what a token file holds, published sets to rows."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from trilithon import _store
from trilithon.cli import _data_convert as _convert
from trilithon.cli import _data_stories as _stories
from trilithon.cli import _extra
from trilithon.cli._output import (
    EXIT_CHECK_FAILED,
    EXIT_INVALID_DATA,
    EXIT_OK,
    EXIT_USAGE,
    Progress,
    explain,
    human_bytes,
    print_json,
    print_table,
    printable,
)
from trilithon.cli._parser import Parser, UsageError

_USAGE_CODES = ("data_exists", "data_missing", "data_eod", "tokenizer_missing", "tokenizer_kind", "vocab_size")
_PEEK_DOCUMENTS, _PEEK_TOKENS = 3, 48


def add_arguments(parser: Parser) -> None:
    """Add the actions."""
    parser.add_examples("trilithon data prepare texts.jsonl --tokenizer smollm2-135m-instruct --output corpus")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_prepare(actions.add_parser("prepare", help="turn texts into an indexed token file"))
    _add_tokenizer(actions.add_parser("tokenizer", help="train a vocabulary: SentencePiece, or BERT's word pieces"))
    _add_fragmentation(actions.add_parser("fragmentation", help="say how finely vocabularies cut texts, side by side"))
    _add_info(actions.add_parser("info", help="say what a token file holds"))
    _convert.add(actions.add_parser("convert", help="turn a published data set into rows to finetune on"))
    _stories.add(actions.add_parser("stories", help="label stories with keywords and facts, to finetune on"))


def run(args: argparse.Namespace) -> int:
    """Do what the action says; a mistake in the data is exit code 3."""
    if args.action == "convert":
        return _convert.run(args)
    if args.action == "stories":
        return _stories.run(args)
    actions = {"prepare": _prepare, "tokenizer": _tokenizer, "fragmentation": _fragmentation, "info": _info}
    errors = _load("errors")
    config = _extra.load("trilithon_parallel.config", verb="data", extra="engine")
    try:
        return actions[args.action](args)
    except errors.DataError as error:
        code = EXIT_USAGE if error.code in _USAGE_CODES else EXIT_INVALID_DATA
        return _explain_lines(error, code, as_json=args.format == "json")
    except config.ModelError as error:
        return explain(error, EXIT_INVALID_DATA, as_json=args.format == "json")


def _add_prepare(parser: Parser) -> None:
    _add_inputs(parser)
    parser.add_argument("--tokenizer", required=True, help="a model, its directory, or a .json or .model file")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end each document with a token [yes]"
    )
    parser.add_argument("--eod", metavar="TOKEN", help="that token, as the vocabulary spells it [its end token]")
    parser.add_argument("--workers", type=count, metavar="N", help="processes [one per core]")
    parser.add_argument("--overwrite", action="store_true", help="replace a token file of this name")
    _add_format(parser)
    parser.add_examples(
        "trilithon data prepare texts.jsonl --tokenizer smollm2-135m-instruct --output corpus",
        "trilithon data prepare texts.jsonl book.txt --tokenizer tok --eod '</s>' --workers 2 --output corpus-2",
    )


def _add_tokenizer(parser: Parser) -> None:
    _add_inputs(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--vocab-size", type=count, required=True, metavar="N", help="number of ids")
    parser.add_argument("--kind", choices=("bpe", "unigram", "wordpiece"), default="bpe", help="what is trained [bpe]")
    parser.add_argument("--lowercase", action="store_true", help="of wordpiece: lower all letters")
    _add_format(parser)
    parser.add_examples(
        "trilithon data tokenizer texts.jsonl --output tok --vocab-size 32000 --kind bpe",
        "trilithon data tokenizer abstracts.jsonl --output bio --vocab-size 8000 --kind wordpiece --lowercase",
    )


def _add_fragmentation(parser: Parser) -> None:
    _add_inputs(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        action="append",
        help="a model, its directory, or a .json or .model file; once for each vocabulary",
    )
    _add_format(parser)
    parser.add_examples("trilithon data fragmentation abstracts.jsonl --tokenizer bio --tokenizer all-minilm-l6-v2")


def _add_info(parser: Parser) -> None:
    parser.add_argument("prefix", type=Path, help="of a .bin and .idx file")
    parser.add_argument("--tokenizer", help="show the first documents as text, by this tokenizer")
    parser.add_argument("--verify", action="store_true", help="compare both files with their recorded SHA-256")
    _add_format(parser)
    parser.add_examples("trilithon data info corpus", "trilithon data info corpus-2 --tokenizer tok -o json")


def _add_inputs(parser: Parser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".jsonl (a document per row) or .txt")
    parser.add_argument("--text-key", default="text", help="the field of a row that holds its text [text]")


def _add_format(parser: Parser) -> None:
    """`-o text|json`, as everywhere; its long form is another here, since `--output` names files."""
    parser.add_argument("-o", "--format", choices=("text", "json"), default="text", help="how to print [text]")


def _prepare(args: argparse.Namespace) -> int:
    prepare = _load("prepare")
    tokenizer = _tokenizer_path(args.tokenizer)
    if args.eod is not None and not args.append_eod:
        raise UsageError("--eod goes with --append-eod only. Given: --no-append-eod too.")
    with Progress("tokenising", total=None) as progress:
        done = prepare.prepare(
            args.inputs,
            args.output,
            tokenizer=tokenizer,
            text_key=args.text_key,
            append_eod=args.append_eod,
            eod=args.eod,
            workers=args.workers or len(os.sched_getaffinity(0)),
            overwrite=args.overwrite,
            progress=lambda bytes_done, total: progress.update(bytes_done, total=total, in_bytes=True),
        )
    if args.format == "json":
        print_json(_fields(done))
        return EXIT_OK
    empty = f" ({done.num_empty} empty ones left out)" if done.num_empty else ""
    print(f"{done.prefix}: {done.num_documents} documents{empty}, {done.num_tokens} tokens of {done.dtype}")
    print(f"Look at it with: trilithon data info {done.prefix} --tokenizer {args.tokenizer}")
    return EXIT_OK


def _tokenizer(args: argparse.Namespace) -> int:
    done = _load("train_tokenizer").train_tokenizer(
        args.inputs,
        args.output,
        vocab_size=args.vocab_size,
        kind=args.kind,
        lowercase=args.lowercase,
        text_key=args.text_key,
    )
    if args.format == "json":
        print_json(_fields(done))
        return EXIT_OK
    print(f"{done.path}: {done.vocab_size} ids from {done.num_documents} documents, {human_bytes(done.num_bytes)}")
    if args.kind == "wordpiece":
        print(f"Give it to an encoder with: trilithon checkpoint change-vocabulary MODEL {done.path} OUT")
    else:
        print(f"Use it with: trilithon data prepare ... --tokenizer {done.path}")
    return EXIT_OK


def _fragmentation(args: argparse.Namespace) -> int:
    count_files, open_tokenizer = _load("fragmentation").fragmentation_of_files, _load("prepare").open_tokenizer
    tokenizers = {name: open_tokenizer(_tokenizer_path(name)) for name in args.tokenizer}
    found = {name: count_files(args.inputs, item, text_key=args.text_key) for name, item in tokenizers.items()}
    shares = ("pieces_per_word", "bytes_per_piece", "whole_share", "unknown_share")
    if args.format == "json":
        rows = {
            name: {"vocab_size": tokenizers[name].vocab_size, **_fields(counts)}
            | {share: getattr(counts, share) for share in shares}
            for name, counts in found.items()
        }
        print_json(rows)
        return EXIT_OK
    first = next(iter(found.values()))
    print(f"{first.words:,} words, {human_bytes(first.num_bytes)}")
    print_table(
        ("vocabulary", "ids", "pieces a word", "bytes a piece", "whole words", "unknown words"),
        [
            (
                name,
                f"{tokenizers[name].vocab_size:,}",
                f"{counts.pieces_per_word:.3f}",
                f"{counts.bytes_per_piece:.2f}",
                f"{counts.whole_share:.1%}",
                f"{counts.unknown_share:.2%}",
            )
            for name, counts in found.items()
        ],
    )
    return EXIT_OK


def _info(args: argparse.Namespace) -> int:
    index = _load("index")
    tokens = index.IndexedTokens(args.prefix)
    facts = tokens.facts()
    lengths = tokens.document_lengths()
    found: dict[str, Any] = {
        "prefix": str(tokens.prefix),
        "documents": tokens.num_documents,
        "sequences": tokens.num_sequences,
        "tokens": tokens.num_tokens,
        "dtype": tokens.dtype.name,
        "size_bytes": tokens.num_tokens * tokens.dtype.itemsize,
        "document_tokens": {
            "min": int(lengths.min(initial=lengths.max(initial=0))),
            "mean": round(tokens.num_tokens / max(1, tokens.num_documents), 1),
            "max": int(lengths.max(initial=0)),
        },
        "eod_id": facts.get("eod_id"),
        "tokenizer": facts.get("tokenizer"),
        "vocab_size": facts.get("vocab_size"),
        "digest": tokens.digest,
    }
    if args.verify:
        found["verified"] = _verified(index, tokens.prefix, facts)
    if args.tokenizer:
        found["peek"] = _peek(tokens, _load("prepare").open_tokenizer(_tokenizer_path(args.tokenizer)), facts)
    if args.format == "json":
        print_json(found)
    else:
        _print_info(found)
    return EXIT_OK if found.get("verified", True) else EXIT_CHECK_FAILED


def _peek(tokens: Any, tokenizer: Any, facts: dict[str, Any]) -> list[str]:
    """How the first documents begin."""
    if facts.get("tokenizer") not in (None, tokenizer.digest):
        raise UsageError(
            f"--tokenizer must be the one that made {tokens.prefix}, with digest {facts['tokenizer']}. "
            f"Given: one with digest {tokenizer.digest}."
        )
    texts = []
    for document in range(min(_PEEK_DOCUMENTS, tokens.num_documents)):
        ids = tokens.read(document)[:_PEEK_TOKENS].tolist()
        if any(not 0 <= token < tokenizer.vocab_size for token in ids):
            raise UsageError(
                f"--tokenizer must have every id of document {document}, up to {max(ids)}. "
                f"Given: one of {tokenizer.vocab_size} ids."
            )
        texts.append(tokenizer.decode(ids, skip_special_tokens=False))
    return texts


def _verified(index: ModuleType, prefix: Path, facts: dict[str, Any]) -> bool:
    """Whether both files are, byte for byte, those that were written."""
    for suffix in ("bin", "idx"):
        if f"{suffix}_sha256" not in facts:
            raise UsageError(f"--verify needs {prefix}.json, which `trilithon data prepare` writes. Given: none.")
        with index.file_of(prefix, suffix).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts[f"{suffix}_sha256"]:
                return False
    return True


def _print_info(found: dict[str, Any]) -> None:
    lengths = found["document_tokens"]
    print(f"{found['prefix']}: {found['documents']} documents, {found['tokens']} tokens")
    print(f"  tokens    {found['dtype']}, {human_bytes(found['size_bytes'])}")
    print(f"  lengths   {lengths['min']} to {lengths['max']} tokens per document, {lengths['mean']} on average")
    print(f"  sequences {found['sequences']}")
    if found["tokenizer"]:
        print(f"  tokenizer {found['tokenizer']}, {found['vocab_size']} ids")
        print(f"  end       {'none' if found['eod_id'] is None else found['eod_id']}")
    print(f"  digest    {found['digest']}")
    if "verified" in found:
        print(
            f"  sha256    {'as recorded' if found['verified'] else 'NOT as recorded: prepare or copy the data again'}"
        )
    for number, text in enumerate(found.get("peek", [])):
        print(f"  {number}: {printable(text)}")


def _explain_lines(error: Any, code: int, *, as_json: bool) -> int:
    """Findings stand on lines of their own, which `explain` alone would escape."""
    if as_json:
        return explain(error, code, as_json=True)
    first, *others = str(error).splitlines()
    explain(ValueError(first), code)
    for line in others:
        explain(ValueError(line.strip()), code)
    return code


def _tokenizer_path(name: str) -> Path:
    """A file as it stands; else a directory, or a model of the store."""
    return Path(name) if Path(name).is_file() else _store.resolve(name)


def _fields(done: Any) -> dict[str, Any]:
    """A result as JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(done).items()}


def _load(module: str) -> ModuleType:
    return _extra.load(f"trilithon_parallel.data.{module}", verb="data", extra="engine")


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Given: {value}")
    return value
