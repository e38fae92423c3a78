"""
Fills the reference tables of the documentation from the code that they describe.

    python docs/generate.py            write the tables
    python docs/generate.py --check    exit 1 if a page differs from what would be written

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; everything else of a page is written by hand.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from trilithon.errors import SERVER_ERRORS
from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.findings import CODES
from trilithon_finetune.jobs.policy import Policy
from trilithon_finetune.recipes import RECIPES
from trilithon_parallel.pretrain.config import PretrainConfig
from trilithon_server.config import LimitsConfig
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine_client import EngineClient
from trilithon_server.flags import FLAGS, settings_table
from trilithon_server.metrics import Metrics
from trilithon_server.sampling_rules import RULES, UNSUPPORTED
from trilithon_server.validation import Bounds

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_THREAD = re.compile(r"[A-Za-z][\w.-]*#\d+")
_IN_WORDS: Mapping[str, str] = {
    "vocab_size": "the vocabulary size",
    "max_output": "the room in the context",
    "max_prompt": "the context less one",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [list(head), *(list(row) for row in rows)]
    cells = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines]
    cells.insert(1, " | ".join("---" for _ in lines[0]))
    return "".join(f"| {line} |\n" for line in cells)


class _Words(dict[str, Any]):
    """Values for the placeholders of a rule's text: a default limit, or what it depends on."""

    def __missing__(self, name: str) -> object:
        return _IN_WORDS.get(name) or getattr(Bounds(), name)


def parameters() -> str:
    """Every parameter of a generation request."""
    rows = []
    for rule in RULES:
        text = rule.text.replace("the vocabulary size {vocab_size}", "{vocab_size}").format_map(_Words())
        rows.append((f"`{rule.name}`", rule.meaning, text, f"`{rule.proto}`"))
    return table(("JSON name", "meaning", "rule", "gRPC field"), rows)


def unsupported() -> str:
    """Parameters of the contract that this version refuses by name."""
    return table(
        ("JSON name", "gRPC field"), [(f"`{name}`", f"`{proto}`") for name, (proto, *_) in UNSUPPORTED.items()]
    )


def settings() -> str:
    """Every setting and its flag."""
    flags = {path: flag for flag, path in FLAGS.items()}
    rows = [
        (f"`{path}`", f"`{flags[path]}`" if path in flags else "", f"`{default}`", meaning)
        for path, _, default, meaning in settings_table()
    ]
    return table(("setting", "flag", "default", "meaning"), rows)


def errors() -> str:
    """The tree of errors, as it crosses each wire."""
    rows = [
        (
            f"`{error.__name__}`",
            (error.__doc__ or "").strip().rstrip("."),
            f"`{error.default_code}`",
            str(error.http_status),
            f"`{error.grpc_status}`",
            f"`{error.openai_type}`",
            "yes" if error.retryable else "no",
        )
        for error in SERVER_ERRORS
    ]
    return table(("class", "when", "usual code", "HTTP", "gRPC", "OpenAI `type`", "retry"), rows)


def metrics() -> str:
    """Every metric that a server with one engine exports."""
    registry = Metrics(version="0")
    engine = EngineClient(name="main", socket_path=Path("unused"), limits=LimitsConfig())
    engine.hello, engine.losses = wire.Hello(tp=1, pp=1), {"killed": 1}
    engine.hello.startup_seconds["weights"] = 1.0
    registry.watch_engine("m", engine)
    rows = []
    for family in sorted(registry.registry.collect(), key=lambda family: str(family.name)):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append((f"`{name}`", family.type, family.documentation.rstrip(".")))
    return table(("name", "type", "meaning"), rows)


def pretrain() -> str:
    """Every field of a pretraining configuration."""
    return table(("field", "default", "meaning"), _fields(PretrainConfig, ""))


def jobs() -> str:
    """Every field of a finetuning job's configuration."""
    return table(("field", "default", "meaning"), _fields(JobConfig, ""))


def policy() -> str:
    """Every field of a job store's policy."""
    return table(("field", "default", "meaning"), _fields(Policy, ""))


def tasks() -> str:
    """Every task of a finetuning job, with what its recipe chooses where the configuration does not."""
    rows = []
    for name, recipe in RECIPES.items():
        chosen = recipe.defaults
        rate = f"{chosen.lr_full:g}"
        if recipe.head in ("vocabulary", "preference") and name != "mlm":
            rate = f"{chosen.lr_lora:g}, full {rate}"
        elif chosen.head_lr_factor != 1:
            rate = f"{rate}, head {chosen.lr_full * chosen.head_lr_factor:g}"
        metric, better = recipe.best_metric
        rows.append(
            (
                f"`{name}`",
                ", ".join(f"`{form}`" for form in recipe.formats),
                rate,
                f"{chosen.schedule}, warm-up {chosen.warmup_ratio:g}",
                f"{chosen.epochs} x {chosen.batch_size}",
                str(chosen.max_tokens),
                f"`{metric}` ({better})",
            )
        )
    head = ("task", "rows", "learning rate", "schedule", "epochs x batch", "max_tokens", "best by")
    return table(head, rows)


def options() -> str:
    """Options of the tasks that have any."""
    rows = [
        (f"`{name}`", f"`options.{field}`", *rest)
        for name, recipe in RECIPES.items()
        for field, *rest in ((field.strip("`"), *rest) for field, *rest in _fields(recipe.Options, ""))
    ]
    return table(("task", "field", "default", "meaning"), rows)


def findings() -> str:
    """Every finding of a data file."""
    return table(("code", "severity", "about"), [(f"`{code}`", *about) for code, about in CODES.items()])


def _fields(section: type[BaseModel], prefix: str) -> Iterable[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        if prefix == "launch.":
            continue  # its sections repeat launch.slurm and launch.kubernetes, which docs/launch.md tells of
        inner = next((kind for kind in _kinds(field.annotation) if issubclass(kind, BaseModel)), None)
        if inner is not None:
            mark = ".N." if any(kind in str(field.annotation) for kind in ("list", "tuple")) else "."
            yield from _fields(inner, f"{prefix}{name}{mark}")
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"
        yield f"`{prefix}{name}`", default, (field.description or "").strip()


def _kinds(annotation: object) -> Iterable[type]:
    """The classes inside an annotation."""
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def threads() -> str:
    """Public threads of other projects, each with the tests whose docstrings name it."""
    found: dict[str, list[str]] = {}
    tests = DOCS.parent / "tests"
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                for thread in sorted(set(_THREAD.findall(ast.get_docstring(node) or ""))):
                    found.setdefault(thread, []).append(f"`{path.relative_to(tests)}` `{node.name}`")
    return table(("thread", "held by"), ((thread, ", ".join(held)) for thread, held in sorted(found.items())))


TABLES: Mapping[str, Callable[[], str]] = {
    "threads": threads,
    "pretrain": pretrain,
    "jobs": jobs,
    "policy": policy,
    "tasks": tasks,
    "options": options,
    "findings": findings,
    "parameters": parameters,
    "unsupported": unsupported,
    "settings": settings,
    "errors": errors,
    "metrics": metrics,
}


def filled(text: str) -> str:
    """A page with its tables as they are now."""
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}{block[3]}", text)


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        new = filled(text)
        if new == text:
            continue
        stale.append(page.name)
        if "--check" not in arguments:
            page.write_text(new)
    if stale and "--check" in arguments:
        print(f"docs: {', '.join(stale)} differ from the code. Run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
