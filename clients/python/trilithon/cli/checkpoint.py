"""`trilithon checkpoint`: verify and export what training runs keep, and make models to begin others from."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

from trilithon import _store
from trilithon.cli import _extra
from trilithon.cli._output import EXIT_INVALID_DATA, EXIT_OK, explain
from trilithon.cli._parser import Parser

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: Parser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="read every file of a checkpoint and compare its checksums")
    verify.add_argument("checkpoint", type=Path, help="RUN/step_00000100")
    export = actions.add_parser("export", help="write a checkpoint's weights as a model directory")
    export.add_argument("checkpoint", type=Path, help="RUN/step_00000100")
    export.add_argument("out", type=Path, help="the directory to write; must not exist")
    export.add_argument("--dtype", choices=_DTYPES, help="of the weights written [the checkpoint's]")
    megatron = actions.add_parser("import-megatron", help="write a Megatron-LM checkpoint as a model directory")
    megatron.add_argument("checkpoint", type=Path, help="iter_0001000 with mp_rank_XX folders, format `torch`")
    megatron.add_argument("out", type=Path, help="the directory to write; must not exist")
    megatron.add_argument("--config", type=Path, required=True, help="a directory with the model's config.json")
    megatron.add_argument("--dtype", choices=_DTYPES, help="of the weights written [the checkpoint's]")
    vocabulary = actions.add_parser("change-vocabulary", help="write an encoder with another vocabulary, to train on")
    vocabulary.add_argument("model", help="an encoder: a name in the store or a directory")
    vocabulary.add_argument("tokenizer", type=Path, help="the directory of the other vocabulary")
    vocabulary.add_argument("out", type=Path, help="the directory to write; must not exist")
    verify.add_examples("trilithon checkpoint verify run/step_00000100")
    export.add_examples("trilithon checkpoint export run/step_00000100 model --dtype bfloat16")
    megatron.add_examples("trilithon checkpoint import-megatron iter_0001000 model --config config")
    vocabulary.add_examples("trilithon checkpoint change-vocabulary all-minilm-l6-v2 bio bio-minilm")
    parser.add_examples("trilithon checkpoint verify run/step_00000100")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    errors = _load("checkpoint.errors")
    try:
        if args.action == "verify":
            grid = _load("grid").Grid.single()
            manifest = _load("checkpoint").verify(args.checkpoint, axis=grid.world)
            print(
                f"{args.checkpoint} is good: step {manifest.step}, {manifest.consumed_samples} samples, "
                f"{len(manifest.files)} files."
            )
            return EXIT_OK
        if args.action == "change-vocabulary":
            changed = _load("weights.vocabulary").change_vocabulary(
                _store.resolve(args.model), args.tokenizer, args.out
            )  # fmt: skip
            print(
                f"{args.out} is written: {changed.kept} pieces as they were, {changed.averaged} as means of several, "
                f"{changed.unknown} unknown. Train it on with task mlm."
            )
            return EXIT_OK
        dtype = (
            None if args.dtype is None else getattr(_extra.load("torch", verb="checkpoint", extra="engine"), args.dtype)
        )
        if args.action == "export":
            _load("checkpoint").export(args.checkpoint, args.out, dtype=dtype)
        else:
            config = _load("config").load_config(args.config)
            _load("checkpoint.megatron").import_megatron(
                args.checkpoint, args.out, config=config, side_files_from=args.config, dtype=dtype
            )
    except (errors.CheckpointError, _load("config").ModelError) as error:
        return explain(error, EXIT_INVALID_DATA, as_json=False)
    print(f"{args.out} is written. Serve it with: trilithon serve {args.out}")
    return EXIT_OK


def _load(name: str) -> ModuleType:
    return _extra.load(f"trilithon_parallel.{name}", verb="checkpoint", extra="engine")
