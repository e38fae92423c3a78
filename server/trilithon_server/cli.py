"""
The verbs `serve` and `config`: parse, check everything that can be checked, then hand over to the supervisor.

The supervisor's process imports no torch. Exit codes: 0 ok, 2 usage or configuration, 3 invalid model, 6 engine lost,
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from trilithon_server import logs
from trilithon_server.banner import ready_block
from trilithon_server.config import ServeConfig, config_schema, environment_api_keys
from trilithon_server.config_sources import ConfigError, Loaded, resolve, show
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.supervisor import EXIT_USAGE, Supervisor
from trilithon_server.extension import Launch
from trilithon_server.flags import add_config_flags, load_from_args
from trilithon_server.preflight import ModelRefused, check_files, check_model, choose_ports, engine_spec, find_model
from trilithon_server.rundir import RunDirError, run_directory

EXIT_INVALID_MODEL = 3

_log = logging.getLogger(__name__)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything that `trilithon serve` takes."""
    add_config_flags(parser)
    launch = parser.add_argument_group("launch")
    launch.add_argument(
        "--launch",
        choices=("local", "external"),
        default="local",
        help="local: start the ranks here; external: attach to ranks that torchrun starts with the same --run-dir",
    )
    launch.add_argument("--run-dir", metavar="DIR", help="directory of the processes' sockets (mode 0700)")
    launch.add_argument(
        "--write-spec",
        metavar="FILE",
        help="write what the ranks of `--launch external` are told, then exit; - is stdout",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES


def run_serve(args: argparse.Namespace, *, launch: Callable[[ServeConfig], Launch]) -> int:
    """
    Serve until stopped; returns the exit code.

    Args:
        launch: says what runs beside the engines; ConfigError where a setting of an addition is unusable.
    """
    try:
        loaded = resolve(load_from_args(args), model_dir=find_model)
        check_files(loaded.config)
        kinds = [check_model(engine) for engine in loaded.config.engines]
        started = launch(loaded.config)
        queue = started.config.limits.max_queue_requests
        named = started.config.server.catalog is not None
        specs = [
            engine_spec(engine, limits_queue=queue, takes_adapters=named or bool(engine.adapters))
            for engine in started.config.engines
        ]
        if args.write_spec is not None:
            return _write_spec(args.write_spec, specs)
        if args.launch == "external" and args.run_dir is None:
            raise ConfigError(
                ["--launch external needs --run-dir. Given: none. Name the directory that the ranks use."]
            )
        config = choose_ports(started.config)
    except ConfigError as error:
        return _refuse(error.violations, EXIT_USAGE)
    except ModelRefused as error:
        return _refuse([str(error)], EXIT_INVALID_MODEL)
    log_format = logs.resolve_format(config.server.log_format)
    config = config.model_copy(update={"server": config.server.model_copy(update={"log_format": log_format})})
    logs.configure(log_format=log_format, level=config.server.log_level, process="supervisor")
    _log_choices(loaded)
    needs_key = config.server.api_keys_file is not None or environment_api_keys() is not None

    def on_ready() -> None:
        print(ready_block(config, kind=kinds[0], needs_key=needs_key), flush=True)

    try:
        with run_directory(Path(args.run_dir) if args.run_dir is not None else None) as run_dir:
            external = args.launch == "external"
            return Supervisor(
                config,
                specs,
                run_dir=run_dir,
                external=external,
                on_ready=on_ready,
                write_line=logs.ChildOutput(log_format).write,
                front_module=started.front_module,
                companions=started.companions,
            ).run()
    except RunDirError as error:
        return _refuse([str(error)], EXIT_USAGE)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `trilithon config` takes: `show` (with the flags of `serve`) and `schema`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show_parser = actions.add_parser("show", help="print the configuration that the given flags and sources make")
    show_parser.add_argument("--resolved", action="store_true", help="also fill what depends on machine and model")
    show_parser.add_argument("--origin", action="store_true", help="name the source of each value")
    add_config_flags(show_parser)
    actions.add_parser("schema", help="print the JSON Schema of configuration files")


def run_config(args: argparse.Namespace) -> int:
    """Print the configuration or its schema; returns the exit code."""
    if args.action == "schema":
        print(json.dumps(config_schema(), indent=2))
        return 0
    try:
        loaded = load_from_args(args)
        if args.resolved:
            loaded = resolve(loaded, model_dir=find_model)
    except ConfigError as error:
        return _refuse(error.violations, EXIT_USAGE)
    except ModelRefused as error:
        return _refuse([str(error)], EXIT_INVALID_MODEL)
    print(show(loaded, origin=args.origin))
    return 0


def _log_choices(loaded: Loaded) -> None:
    """Say what was chosen where nothing was set: the number format above all, for it changes speed and numbers."""
    for index, engine in enumerate(loaded.config.engines):
        reason = loaded.origins.get(f"engines.{index}.dtype", "set").removeprefix("computed: ")
        fields = {"engine": engine.name, "model": engine.served_name, "tp": engine.tp, "pp": engine.pp}
        fields |= {"dtype": engine.dtype, "dtype_because": reason, "threads_per_rank": engine.num_threads}
        _log.info("engine_starts", extra=fields)
    if loaded.config.server.insecure:
        _log.warning(
            "insecure", extra={"host": loaded.config.server.host, "meaning": "anyone who reaches it may use it"}
        )


def _write_spec(target: str, specs: list[EngineSpec]) -> int:
    if len(specs) != 1:
        return _refuse([f"--write-spec writes the spec of one engine. Given: {len(specs)} engines."], EXIT_USAGE)
    if target == "-":
        print(specs[0].to_json())
        return 0
    try:
        Path(target).write_text(specs[0].to_json() + "\n", encoding="utf-8")
    except OSError as error:
        return _refuse([f"--write-spec must be a writable file. Given: {target} ({error.strerror})."], EXIT_USAGE)
    return 0


def _refuse(sentences: list[str] | tuple[str, ...], code: int) -> int:
    for sentence in sentences:
        print(f"trilithon: {logs.escape(sentence)}", file=sys.stderr)
    return code


_EXAMPLES = """examples:
  trilithon serve smollm2-135m-instruct
  trilithon serve models/my-model --tp 2 --pp 2 --http-port 8080
  trilithon serve smollm2-135m-instruct --config server.yaml --set limits.max_queue_requests=64
  trilithon serve smollm2-135m-instruct --jobs
  trilithon serve smollm2-135m-instruct --tp 2 --write-spec engine.json
  trilithon serve smollm2-135m-instruct --tp 2 --launch external --run-dir /run/trilithon
"""
