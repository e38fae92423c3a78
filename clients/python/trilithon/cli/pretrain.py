"""`trilithon pretrain`: train a model by a configuration file, here or on a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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
    parser.add_argument("--print", action="store_true", help="with slurm: print the script instead of submitting it")
    parser.add_examples(
        "trilithon pretrain config.yaml",
        "trilithon pretrain config.yaml --check",
        "trilithon pretrain config.yaml --launch slurm",
        "trilithon pretrain config.yaml --launch kubernetes",
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end of the plan, or say why not."""
    config, setup_of, errors = (
        _extra.load(f"trilithon_parallel.{name}", verb="pretrain", extra="train")
        for name in ("pretrain.config", "pretrain.setup", "data.errors")
    )
    try:
        settings = config.load_pretrain_config(args.config)
        setup = setup_of.prepare(settings)
        if args.check:
            train, held_out = setup_of.open_data(settings, setup)
            num_held_out = 0 if held_out is None else held_out.num_samples
            print(
                f"{args.config} is good: {setup.layout.world_size} ranks, {train.num_samples} samples to learn from, "
                f"{num_held_out} held out."
            )
            dry_run = _extra.load("trilithon_parallel.dry_run", verb="pretrain", extra="train")
            print(dry_run.of_run(settings, setup).text())
            return EXIT_OK
    except (config.ModelError, errors.DataError) as error:
        code = EXIT_USAGE if getattr(error, "code", "") in _USAGE_CODES else EXIT_INVALID_DATA
        return explain(error, code, as_json=False)
    if args.launch == "local":
        return _local(args.config, settings, num_ranks=setup.layout.world_size)
    launch = _extra.load("trilithon_parallel.pretrain.clusters", verb="pretrain", extra="train")
    try:
        if args.launch == "kubernetes":
            print(launch.kubernetes_manifest(settings, num_ranks=setup.layout.world_size), end="")
        elif args.print:
            print(launch.slurm_script(args.config, settings, num_ranks=setup.layout.world_size), end="")
        else:
            print(f"job {launch.submit(args.config, settings, num_ranks=setup.layout.world_size)} is submitted")
    except (launch.LaunchError, config.ModelError) as error:
        return explain(error, EXIT_USAGE, as_json=False)
    return EXIT_OK


def _local(path: Path, settings: Any, *, num_ranks: int) -> int:
    """One rank in this process, with its live display; several as processes that are watched as one."""
    if num_ranks == 1:
        return int(_extra.load("trilithon_parallel.pretrain.run", verb="pretrain", extra="train").main(path))
    launch = _extra.load("trilithon_parallel.launch.local", verb="pretrain", extra="train")
    code = launch.local(
        [sys.executable, "-m", "trilithon_parallel.pretrain", str(path)],
        nproc=num_ranks,
        run_dir=settings.run.directory,
        max_restarts=settings.run.max_restarts,
        num_threads=settings.run.num_threads,
    )
    return int(code)
