"""The small things that requests of several routes and RPCs have in common, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import pydantic

from trilithon.errors import InvalidArgument
from trilithon_finetune.api.convert import job_config
from trilithon_finetune.config import JobConfig
from trilithon_finetune.jobs.records import Purpose
from trilithon_server.config import LimitsConfig
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.parse import parse
from trilithon_server.http.strict_json import parse_object
from trilithon_server.validation import Violations, invalid

M = TypeVar("M", bound=pydantic.BaseModel)

MAX_KEY_CHARS = 255
MAX_SEQ = 2**63 - 1


def idempotency_key(given: str | None) -> str | None:
    """
    The key of a request, or None.

    Raises:
        InvalidArgument: it is too long or not printable.
    """
    if given and (len(given) > MAX_KEY_CHARS or not (given.isascii() and given.isprintable())):
        raise invalid("idempotency_key", f"must be 1 to {MAX_KEY_CHARS} printable ASCII characters", given=given)
    return given or None


def page_limit(query: Mapping[str, str]) -> int:
    """The `limit` of a list, 20 when it is unset. Raises InvalidArgument."""
    return number(query, "limit", default=20, low=1, high=100)


def number(query: Mapping[str, str], name: str, *, default: int, low: int, high: int = MAX_SEQ) -> int:
    """A whole number of the query. Raises InvalidArgument."""
    given = query.get(name)
    if given is None:
        return default
    value = int(given) if given.isascii() and given.isdigit() and len(given) < 20 else -1
    return in_range(name, value, low=low, high=high, given=given)


def in_range(name: str, value: int, *, low: int, high: int, given: object) -> int:
    """The number itself. Raises InvalidArgument when it is out of its range."""
    if not low <= value <= high:
        rule = f"must be from {low} to {high}" if high < MAX_SEQ else f"must be a whole number from {low}"
        raise invalid(name, rule, given=given)
    return value


def flag(query: Mapping[str, str], name: str, *, default: bool) -> bool:
    """`true` or `false` of the query. Raises InvalidArgument."""
    given = query.get(name)
    if given is None:
        return default
    if given not in ("true", "false"):
        raise invalid(name, "must be true or false", given=given)
    return given == "true"


def last_event_id(exchange: Exchange) -> int:
    """Where a browser's stream goes on after a cut; 0 for a new one. Raises InvalidArgument."""
    given = exchange.header(b"last-event-id")
    return number({} if given is None else {"last-event-id": given}, "last-event-id", default=0, low=0)


async def parsed(model: type[M], exchange: Exchange) -> M:
    """The JSON body of a request; an empty one is an empty object. Raises InvalidArgument."""
    result = parse(model, await exchange.json(), exchange.limits, parameters=False)
    result.found.raise_if_any()
    return result.body


async def no_body(exchange: Exchange) -> None:
    """Nothing, or an empty JSON object, is in the body. Raises InvalidArgument."""
    raw = await exchange.body()
    if raw.strip() and parse_object(raw):
        raise InvalidArgument("this request takes no parameters. Send it without a body.", code="unexpected_body")


def purpose_of(given: str | None, *, made: bool = False) -> Purpose:
    """
    A purpose that a request names; `made`: also that of files that jobs make.

    Raises:
        InvalidArgument: it is unset or another.
    """
    allowed = ("fine-tune", "evidence", *(("fine-tune-results",) if made else ()))
    if not given:
        raise invalid("purpose", "must be set, before the file", code="missing_parameter")
    if given not in allowed:
        raise invalid("purpose", f"must be one of {', '.join(allowed)}", given=given)
    return cast(Purpose, given)


def check_config(model: str, task: str, file_id: str, limits: LimitsConfig) -> JobConfig:
    """The configuration under which a file alone is checked. Raises InvalidArgument."""
    return job_config({"model": model, "training_file": file_id, "trilithon": {"task": task or "sft"}}, limits)


def report_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dataset report that a check made."""
    return cast(Mapping[str, Any], data.get("report") or {})


def estimate_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    The estimate that a check made.

    Raises:
        InvalidArgument: `invalid_training_file`, the data has errors, which the first findings name.
    """
    estimate = data.get("estimate")
    if estimate is not None:
        return cast(Mapping[str, Any], estimate)
    found = Violations()
    for item in report_of(data).get("findings") or ():
        if item.get("severity") == "error":
            where = f"{item.get('file')}:{item.get('line')} {item.get('path', '')}".strip()
            found.say("training_file", f"{where}: {item.get('message')}", code="invalid_training_file")
    found.raise_if_any()
    raise InvalidArgument("the training file cannot be used.", code="invalid_training_file")
