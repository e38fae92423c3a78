"""
The everyday flags of `trilithon serve`: one table from flag to setting; help, type and default come from the tree.

Rarer settings have no flag: `--set a.b=c`, the environment and `--config` reach every one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trilithon._store import home
from trilithon_server.config import EngineConfig, JobsConfig, LimitsConfig, ServeConfig, ServerConfig, TelemetryConfig
from trilithon_server.config_sources import ENV_PREFIX, ConfigError, Loaded, Setting, load, read_file

FLAGS: dict[str, str] = {
    "--tp": "engines.0.tp",
    "--pp": "engines.0.pp",
    "--dtype": "engines.0.dtype",
    "--device": "engines.0.device",
    "--backend": "engines.0.backend",
    "--quantization": "engines.0.quantization",
    "--max-context": "engines.0.max_context",
    "--kv-cache-bytes": "engines.0.kv_cache_bytes",
    "--memory-fraction": "engines.0.memory_fraction",
    "--max-batch-tokens": "engines.0.max_batch_tokens",
    "--batch-invariant": "engines.0.batch_invariant",
    "--served-name": "engines.0.served_name",
    "--chat-template": "engines.0.chat_template",
    "--adapter": "engines.0.adapters",
    "--host": "server.host",
    "--http-port": "server.http_port",
    "--grpc-port": "server.grpc_port",
    "--metrics-port": "server.metrics_port",
    "--uds": "server.uds",
    "--api-keys-file": "server.api_keys_file",
    "--insecure": "server.insecure",
    "--tls-cert": "server.tls_cert",
    "--tls-key": "server.tls_key",
    "--tls-client-ca": "server.tls_client_ca",
    "--public-ui": "server.public_ui",
    "--allow-origin": "server.allow_origin",
    "--reflection": "server.reflection",
    "--drain-seconds": "server.drain_seconds",
    "--on-rank-loss": "server.on_rank_loss",
    "--log-format": "server.log_format",
    "--jobs": "jobs.store",
    "--jobs-database": "jobs.database",
    "--job-slots": "jobs.slots",
}

_GROUPS = {"engines": "model and engine", "server": "server", "jobs": "finetuning jobs"}
_SECTIONS: dict[str, type[BaseModel]] = {
    "engines": EngineConfig,
    "server": ServerConfig,
    "limits": LimitsConfig,
    "telemetry": TelemetryConfig,
    "jobs": JobsConfig,
}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, `--config`, `--set` and every everyday flag."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model directory, or a name in the model store")
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML or JSON file of settings; may be repeated"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", dest="settings", help="any setting of the tree"
    )
    groups = {section: parser.add_argument_group(title) for section, title in _GROUPS.items()}
    for flag, path in FLAGS.items():
        section = path.partition(".")[0]
        field = field_of(path)
        words = f"{field.description} [{environment_name(path)}; default: {_default_text(field)}]".replace("%", "%%")
        if field.annotation in (bool, bool | None):
            groups[section].add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=words)
        elif path == "jobs.store":  # the flag alone means the user's own store
            store = str(home() / "finetune")
            groups[section].add_argument(flag, metavar="DIR", nargs="?", const=store, help=f"{words}; alone: {store}")
        elif field.default == {}:
            groups[section].add_argument(flag, action="append", metavar="NAME=PATH", help=words)
        else:
            groups[section].add_argument(flag, metavar=flag.rpartition("-")[2].upper(), help=words)


def load_from_args(args: argparse.Namespace) -> Loaded:
    """
    The configuration that parsed arguments, the environment and the named files give.

    Raises:
        ConfigError: every violation found.
    """
    flags = [Setting("engines.0.model", args.model, "argument MODEL")] if args.model is not None else []
    for flag, path in FLAGS.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            flags.append(Setting(path, _text(value), f"flag {flag}"))
    files = [Path(name) for name in args.config]
    _refuse_ambiguous(flags, files)
    return load(files=files, sets=args.settings, flags=flags)


def _text(value: object) -> str:
    """A flag's value as the other sources write it."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def environment_name(path: str) -> str:
    """
    The environment variable of a setting.

    >>> environment_name("server.http_port")
    'TRILITHON_SERVER__HTTP_PORT'
    """
    return ENV_PREFIX + path.upper().replace(".", "__")


def field_of(path: str) -> FieldInfo:
    """The field of the tree that a dotted path names; KeyError when there is none."""
    section, _, rest = path.partition(".")
    return _SECTIONS[section].model_fields[rest.removeprefix("0.")]


def settings_table() -> list[tuple[str, str, str, str]]:
    """Every setting as (path, environment name, default, description): what the reference page is made from."""
    rows = []
    for section in ServeConfig.model_fields:
        prefix = "engines.0" if section == "engines" else section
        for name, field in _SECTIONS[section].model_fields.items():
            path = f"{prefix}.{name}"
            rows.append((path, environment_name(path), _default_text(field), field.description or ""))
    return rows


def _default_text(field: FieldInfo) -> str:
    value: Any = field.default
    if field.is_required():
        return "required"
    if value is None or value in ((), {}):
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_ambiguous(flags: Sequence[Setting], files: Sequence[Path]) -> None:
    """A flag of one engine is refused when the files describe several: it would change the first in silence."""
    engines: object = None
    for path in files:
        engines = read_file(path).get("engines", engines)
    if not isinstance(engines, list) or len(engines) < 2:
        return
    wrong = [flag for flag in flags if flag.path.startswith("engines.")]
    if wrong:
        hint = "Use --set engines.N.{field}=VALUE."
        raise ConfigError(
            [
                f"{flag.origin} must not be used with several engines. Given: {len(engines)} engines in the files. "
                + hint.format(field=flag.path.rpartition(".")[2])
                for flag in wrong
            ]
        )
