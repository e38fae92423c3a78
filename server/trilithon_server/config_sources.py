"""
Where settings come from, and what the unset ones become.

    flags  >  --set a.b=c  >  environment TRILITHON_A__B  >  --config FILE (later wins)  >  computed  >  default

Every value keeps its origin, so `trilithon config show --resolved --origin` can say who set what, and an error can
name the flag, the variable or the file to change.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trilithon_server.config import EngineConfig, ServeConfig, check_exposure

ENV_PREFIX = "TRILITHON_"

_RULES = {
    "missing": "is required",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} entry",
    "too_long": "must have at most {max_length} entries",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "model_type": "must be a mapping of settings",
    "model_attributes_type": "must be a mapping of settings",
}


class ConfigError(ValueError):
    """One or more settings are wrong; `violations` has one sentence for each."""

    def __init__(self, violations: Sequence[str]) -> None:
        super().__init__("\n".join(violations))
        self.violations = tuple(violations)


@dataclass(frozen=True)
class Loaded:
    """A configuration and, by dotted path, where each value that is not a default came from."""

    config: ServeConfig
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Setting:
    """One value from a flag, `--set` or the environment: dotted path, text and origin."""

    path: str
    value: str
    origin: str


def load(
    *,
    files: Sequence[Path] = (),
    sets: Sequence[str] = (),
    flags: Sequence[Setting] = (),
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """
    Read all sources, later ones winning, and validate the whole.

    >>> loaded = load(sets=["engines.0.model=m", "server.http_port=9000"], environ={"TRILITHON_SERVER__HTTP_PORT": "1"})
    >>> loaded.config.server.http_port, loaded.origins["server.http_port"]
    (9000, '--set server.http_port')

    Raises:
        ConfigError: every violation found, each naming its source.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    violations: list[str] = []
    for path in files:
        try:
            _merge(tree, read_file(path), origins, f"file {path.name}", ())
        except ConfigError as error:
            violations += error.violations
    settings = [*_from_environment(os.environ if environ is None else environ), *_from_sets(sets, violations)]
    for setting in sorted([*settings, *flags], key=_entries):  # entry 0 may come from a later source than entry 1
        try:
            _put(tree, setting, origins)
        except ConfigError as error:
            violations += error.violations
    if violations:
        raise ConfigError(violations)
    try:
        config = ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([line for item in error.errors() for line in _sentences(item, origins)]) from None
    exposed = check_exposure(config.server)
    if exposed is not None:
        raise ConfigError([_blame(exposed, origins.get("server.host"))])
    return Loaded(config, origins)


def resolve(loaded: Loaded, *, model_dir: Callable[[str], Path]) -> Loaded:
    """
    Fill every engine value that was left open, from the device, the processor and the model's directory.

    Args:
        model_dir: turns a model's name or path into its directory.
    """
    origins = dict(loaded.origins)
    total_ranks = sum(engine.num_ranks for engine in loaded.config.engines)
    engines = []
    for index, engine in enumerate(loaded.config.engines):
        found: dict[str, tuple[Any, str]] = {}
        directory = model_dir(engine.model)
        if str(directory) != engine.model:
            found["model"] = (str(directory), f"{origins.get(f'engines.{index}.model', 'default')}, found by name")
        if engine.served_name is None:
            found["served_name"] = (directory.name, "computed: the directory's name")
        if engine.dtype == "auto":
            found["dtype"] = best_dtype(engine.device)
        if engine.batch_invariant is None:
            found["batch_invariant"] = _invariance(engine.device, directory)
        for field, on_cpu, on_cuda in _BY_DEVICE:
            if getattr(engine, field) is None:
                found[field] = (on_cpu if engine.device == "cpu" else on_cuda, f"computed: usual on {engine.device}")
        if engine.num_threads is None:
            cores = len(os.sched_getaffinity(0))
            shared = cores if cores <= 2 else cores - 1  # one core is left for the front where there are enough
            reason = f"computed: {cores} cores for {total_ranks} ranks and the front"
            found["num_threads"] = (max(1, shared // total_ranks), reason)
        for field, (_, origin) in found.items():
            origins[f"engines.{index}.{field}"] = origin
        engines.append(engine.model_copy(update={field: value for field, (value, _) in found.items()}))
    names = [engine.served_name for engine in engines]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        message = (
            f"engines served_name must differ between engines. Given: {twice[0]} twice. Set engines.1.served_name."
        )
        raise ConfigError([message])
    return Loaded(loaded.config.model_copy(update={"engines": tuple(engines)}), origins)


_BY_DEVICE: tuple[tuple[str, float, float], ...] = (
    ("memory_fraction", 0.5, 0.9),
    ("max_batch_tokens", 256, 2048),
    ("max_batch_sequences", 64, 256),
)


def best_dtype(device: str) -> tuple[str, str]:
    """The number format that this machine computes fastest, and why: bf16 without bf16 units is slower than fp32."""
    if device != "cpu":
        return "bfloat16", f"computed: {device} has bf16 units"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return "float32", "computed: the processor's features cannot be read"
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512_BF16"), ("bf16", "Arm BF16")):
        if flag in flags:
            return "bfloat16", f"computed: the processor has {name}"
    return "float32", "computed: the processor has neither AMX nor AVX512_BF16, so bf16 would be slower"


def is_seq2seq(model_dir: Path) -> bool:
    """Whether a directory holds an encoder-decoder; what is wrong with it is told by whoever loads it."""
    from trilithon_parallel.config import ModelError, load_config

    try:
        return load_config(model_dir).is_seq2seq
    except ModelError:
        return False


def _invariance(device: str, model_dir: Path) -> tuple[bool, str]:
    """Whether answers are kept from seeing their batch and layout: where our C kernels do it almost for nothing."""
    if device != "cpu":
        return False, f"computed: {device} has no such mode"
    if is_seq2seq(model_dir):
        return False, "computed: encoder-decoders have no such mode"
    if shutil.which("gcc") or shutil.which("cc"):
        return True, "computed: the C kernels have it nearly free"
    return False, "computed: without a C compiler it costs speed"


def show(loaded: Loaded, *, origin: bool = False) -> str:
    """Every value as one `path = value` line, with its source when `origin` is set."""
    values = list(_leaves(loaded.config.model_dump(mode="json"), ""))
    width = max(len(f"{path} = {json.dumps(value)}") for path, value in values)
    lines = []
    for path, value in values:
        line = f"{path} = {json.dumps(value)}"
        lines.append(f"{line:<{min(width, 72)}}  # {loaded.origins.get(path, 'default')}" if origin else line)
    return "\n".join(lines)


def read_file(path: Path) -> dict[str, Any]:
    """A YAML or JSON file as a mapping; ConfigError when it is none, or repeats a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError([f"--config must name a readable file. Given: {path} ({reason})."]) from None
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader that also refuses repeated keys
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError([f"file {path.name} must be YAML or JSON. Given: {detail}"]) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError([f"file {path.name} must hold a mapping of settings. Given: {type(value).__name__}."])
    return value


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _merge(
    into: dict[str, Any], new: Mapping[Any, Any], origins: dict[str, str], origin: str, at: tuple[str, ...]
) -> None:
    for key, value in new.items():
        here = (*at, str(key))
        if isinstance(value, dict) and isinstance(into.get(str(key)), dict):
            _merge(into[str(key)], value, origins, origin, here)
        else:
            into[str(key)] = value
            for path, _ in _leaves(value, ".".join(here)):
                origins[path] = origin


def _entries(setting: Setting) -> list[int]:
    """Which entries of lists a setting is of. Sorting by it leaves settings of one path in their order."""
    return [int(part) for part in setting.path.split(".") if part.isdigit()]


def _put(tree: dict[str, Any], setting: Setting, origins: dict[str, str]) -> None:
    parts = setting.path.split(".")
    node: Any = tree
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(node, list):
            if not part.isdigit() or int(part) > len(node):
                rule = f"must name one of {len(node)} entries, or the next one"
                raise ConfigError([f"{setting.origin}: {setting.path} {rule}. Given: {part}."])
            key: Any = int(part)
            if key == len(node):
                node.append({})
        else:
            key = part
        if following is None:
            node[key] = None if setting.value == "null" else setting.value
        elif isinstance(node, list):
            node = node[key]
        else:
            node = node.setdefault(key, [] if following.isdigit() else {})
        if following is not None and not isinstance(node, dict | list):
            raise ConfigError(
                [f"{setting.origin}: {setting.path} must be a setting of the tree. Given: a path through a value."]
            )
    origins[setting.path] = setting.origin


def _from_environment(environ: Mapping[str, str]) -> list[Setting]:
    names = sorted(name for name in environ if name.startswith(ENV_PREFIX) and "__" in name)
    paths = {name: ".".join(name.removeprefix(ENV_PREFIX).lower().split("__")) for name in names}
    return [Setting(paths[name], environ[name], f"environment {name}") for name in names]


def _from_sets(sets: Sequence[str], violations: list[str]) -> list[Setting]:
    settings = []
    for text in sets:
        path, equals, value = text.partition("=")
        if equals and path:
            settings.append(Setting(path.strip(), value, f"--set {path.strip()}"))
        else:
            violations.append(f"--set must have the form a.b=value. Given: {text}.")
    return settings


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]]
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return [(path, value)]
    return [leaf for key, item in items for leaf in _leaves(item, f"{path}.{key}" if path else key)]


def _sentences(error: ErrorDetails, origins: Mapping[str, str]) -> list[str]:
    path = ".".join(str(part) for part in error["loc"])
    origin = origins.get(path) or next((origins[key] for key in origins if key.startswith(f"{path}.")), None)
    context = error.get("ctx", {})
    if error["type"] == "too_short" and error["input"]:
        return []  # there are entries, and each broken one speaks for itself
    if error["type"] == "extra_forbidden":
        *parents, key = [str(part) for part in error["loc"]]
        near = difflib.get_close_matches(key, _fields_at(parents), n=1)
        hint = f' Did you mean "{".".join([*parents, near[0]])}"?' if near else " Remove it."
        return [_blame(f"{path} is not a setting. Given: {key}.{hint}", origin)]
    if error["type"] == "value_error" and not path:
        return str(context["error"]).splitlines()
    if error["type"] == "value_error":
        rule = str(context["error"])
    else:
        rule = _RULES.get(error["type"], error["msg"][0].lower() + error["msg"][1:]).format_map(context)
    if error["type"] == "missing":
        hint = " Name the model: trilithon serve MODEL." if path in ("engines", "engines.0.model") else ""
        return [f"{path} {rule}.{hint}"]
    given = json.dumps(error["input"], default=str) if not isinstance(error["input"], str) else error["input"]
    return [_blame(f"{path} {rule}. Given: {given[:200]}.", origin)]


def _blame(sentence: str, origin: str | None) -> str:
    return f"{origin}: {sentence}" if origin else sentence


def _fields_at(parents: Sequence[str]) -> list[str]:
    model: type[BaseModel] = ServeConfig
    for part in parents:
        if part == "engines":
            model = EngineConfig
        elif not part.isdigit() and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
    return list(model.model_fields)
