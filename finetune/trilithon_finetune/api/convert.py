"""From a request of either protocol to the configuration of a job; every broken rule is told, not only the first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pydantic

from trilithon.errors import InvalidArgument
from trilithon_finetune.api.schemas import OUTER, CreateJobBody, Hyperparameters
from trilithon_finetune.config import BASE_LR, NO_WANDB, JobConfig, keys_of
from trilithon_server.config import LimitsConfig
from trilithon_server.http.parse import parse
from trilithon_server.http.strict_json import parse_object
from trilithon_server.validation import Violations, nearest, shown

ENCODER_TASKS = ("mlm", "ner", "relation", "classify", "span_qa", "answer_gen")
"""Tasks whose models are trained whole unless the configuration says else."""

_PLACES = {"n_epochs": "epochs", "batch_size": "batch_size"}
"""OpenAI's names of what `training` holds."""


def job_config(document: Mapping[str, Any], limits: LimitsConfig) -> JobConfig:
    """
    The configuration that a body describes.

    Args:
        document: the JSON object of `POST /v1/fine_tuning/jobs`.
    Raises:
        InvalidArgument: with every broken rule; `unsupported_method` and `unsupported_parameter` among their codes.
    """
    parsed = parse(CreateJobBody, document, limits, parameters=False)
    body, found = parsed.body, parsed.found
    inner: dict[str, Any] = dict(body.trilithon or {})
    for name in OUTER:
        if name in inner:
            found.say(
                f"trilithon.{name}",
                f"`trilithon.{name}` stands outside: give `{name}`.",
                code="unknown_parameter",
                rule="is not a parameter here",
            )
            del inner[name]
    _method(body, inner, found)
    outer = {name: value for name in OUTER if (value := getattr(body, name)) is not None}
    if any(item.get("type") == "wandb" for item in body.integrations or ()):
        message = f"`integrations`: {NO_WANDB}"
        found.say("integrations", message, code="unsupported_parameter", rule="must be tensorboard")
        del outer["integrations"]
    try:
        config = JobConfig.model_validate_json(json.dumps({**inner, **outer}), strict=True)
    except pydantic.ValidationError as error:
        _tell(error, found)
        found.raise_if_any()
        raise AssertionError("a validation error was told") from None
    found.raise_if_any()
    return config


def _method(body: CreateJobBody, inner: dict[str, Any], found: Violations) -> None:
    """The method and its hyperparameters, put where the configuration has them."""
    method = body.method
    given: list[tuple[str, Hyperparameters]] = []
    if body.hyperparameters is not None:
        given.append(("hyperparameters", body.hyperparameters))
    if method is not None:
        if method.type == "reinforcement":
            message = "`method.type` must be supervised or dpo. Given: reinforcement, which this server does not have."
            found.say("method.type", message, code="unsupported_method", rule="must be supervised or dpo")
        for name in ("supervised", "dpo", "reinforcement"):
            part = getattr(method, name)
            if part is None:
                continue
            if name != method.type:
                found.add(f"method.{name}", f"must be unset with the type {method.type}")
            elif not isinstance(part, dict) and part.hyperparameters is not None:
                given.append((f"method.{name}.hyperparameters", part.hyperparameters))
        if method.type == "dpo" and inner.setdefault("task", "dpo") != "dpo":
            found.add("trilithon.task", "must be dpo with the method dpo", given=inner["task"])
    if len(given) == 2:
        found.add("hyperparameters", f"must be unset when `{given[1][0]}` is set")
    for place, parameters in given:
        _hyperparameters(place, parameters, inner, found)


def _hyperparameters(place: str, parameters: Hyperparameters, inner: dict[str, Any], found: Violations) -> None:
    values = {name: value for name, value in parameters if value not in (None, "auto")}
    for name, field in _PLACES.items():
        if name in values:
            _put(inner, ("training", field), values[name], f"{place}.{name}", found)
    if "beta" in values:
        _put(inner, ("options", "beta"), values["beta"], f"{place}.beta", found)
    multiplier = values.get("learning_rate_multiplier")
    if multiplier is not None:
        rate = multiplier * BASE_LR[_kind(inner)]
        _put(inner, ("optimizer", "lr"), rate, f"{place}.learning_rate_multiplier", found)


def _kind(inner: Mapping[str, Any]) -> str:
    """What is trained, as far as it matters for the published rate: adapters on decoders unless the body says else."""
    tuning = inner.get("tuning")
    kind = tuning.get("kind") if isinstance(tuning, dict) else None
    if isinstance(kind, str) and kind in BASE_LR:
        return kind
    return "full" if inner.get("task") in ENCODER_TASKS else "lora"


def _put(inner: dict[str, Any], path: tuple[str, str], value: Any, place: str, found: Violations) -> None:
    section = inner.setdefault(path[0], {})
    if not isinstance(section, dict):
        return  # told as a broken rule of its own
    if section.get(path[1]) is not None:
        found.add(place, f"must be unset when `trilithon.{path[0]}.{path[1]}` is set", given=value)
        return
    inner[path[0]] = {**section, path[1]: value}


def _tell(error: pydantic.ValidationError, found: Violations) -> None:
    for item in error.errors(include_url=False, include_context=False):
        path = [str(part) for part in item["loc"]]
        field = ".".join(path) if path and path[0] in OUTER else ".".join(["trilithon", *path])
        if item["type"] == "missing":
            found.add(field, "must be set", code="missing_parameter")
        elif item["type"] == "extra_forbidden":
            name = shown(path[-1])[1:-1]
            known = [key for key in keys_of(path[:-1]) if len(path) > 1 or key not in OUTER]
            hint = nearest(path[-1], known) or f" Allowed: {', '.join(known)}."
            at = ".".join(["trilithon", *path[:-1], name])
            found.say(at, f"unknown parameter `{at}`.{hint}", code="unknown_parameter", rule="is not a parameter here")
        else:
            rule = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be").rstrip(".")
            given = ... if "Given:" in rule or isinstance(item["input"], dict) else item["input"]
            found.add(field, rule[:1].lower() + rule[1:], given=given)


def config_document(
    *,
    model: str,
    training_file: str,
    validation_file: str,
    suffix: str,
    seed: int | None,
    metadata: Mapping[str, str],
    task: str,
    config_json: str,
    priority: int,
) -> dict[str, Any]:
    """
    The body that a `CreateJobRequest` means, so that both protocols are checked by the same rules.

    Raises:
        InvalidArgument: `config_json` is no JSON object, or says again what a field says.
    """
    inner: dict[str, Any] = {}
    if config_json:
        try:
            inner = parse_object(config_json.encode())
        except InvalidArgument as error:
            raise InvalidArgument(f"`config_json`: {error}", code=error.code) from None
    found = Violations()
    for name, value in (("task", task or None), ("priority", priority or None)):
        if value is not None and name in inner:
            found.add(name, "must be unset when `config_json` has it too", given=value)
        elif value is not None:
            inner[name] = value
    found.raise_if_any()
    fields = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file or None,
        "suffix": suffix or None,
        "seed": seed,
        "metadata": dict(metadata) or None,
        "integrations": inner.pop("integrations", None),
        "trilithon": inner,
    }
    return {name: value for name, value in fields.items() if value is not None}
