"""`trilithon pretrain`: train a model by a configuration file, here or on a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trilithon.cli import _extra
from trilithon.cli._output import EXIT_INVALID_DATA, EXIT_OK, EXIT_USAGE, explain
from trilithon.cli._parser import Parser

_USAGE_CODES = ("config_invalid", "layout_invalid")


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("config", type=Path, help="the run's YAML file")
    parser.add_argument(
        "--launch", choices=("local", "slurm", "kubernetes"), default="local", help="where to run it [local]"
    )
    parser.add_argument("--check", action="store_true", help="check file, model, layout and data, and train nothing")
    parser.add_examples("trilithon pretrain config.yaml", "trilithon pretrain config.yaml --check")


def run(args: argparse.Namespace) -> int:
    """Train to the end of the plan, or say why not."""
    settings_of = _extra.load("trilithon_parallel.pretrain.config", verb="pretrain", extra="train")
    setup_of = _extra.load("trilithon_parallel.pretrain.setup", verb="pretrain", extra="train")
    errors = (setup_of.ModelError, _extra.load("trilithon_parallel.data.errors", verb="pretrain", extra="train").DataError)
    try:
        settings = settings_of.load_pretrain_config(args.config)
        setup = setup_of.prepare(settings)
        if args.check:
            train, held_out = setup_of.open_data(settings, setup)
            print(f"{args.config} is good: {setup.layout.world_size} ranks, {train.num_samples} samples to learn from, "
                  f"{0 if held_out is None else held_out.num_samples} held out.")  # fmt: skip
            return EXIT_OK
    except errors as error:
        code = EXIT_USAGE if getattr(error, "code", "") in _USAGE_CODES else EXIT_INVALID_DATA
        return explain(error, code, as_json=False)
    if args.launch == "local" and setup.layout.world_size == 1:
        code: int = _extra.load("trilithon_parallel.pretrain.run", verb="pretrain", extra="train").main(args.config)
        return code
    launch = _extra.load("trilithon_parallel.launch.local", verb="pretrain", extra="train")
    command = [sys.executable, "-m", "trilithon_parallel.pretrain", str(args.config)]
    code = launch.local(
        command,
        nproc=setup.layout.world_size,
        run_dir=settings.run.directory,
        max_restarts=settings.run.max_restarts,
        num_threads=settings.run.num_threads,
    )
    return code
