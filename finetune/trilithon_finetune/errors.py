"""Why a job ended or was refused: one record with a code, a kind and what to do, the same on every surface."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Kind = Literal["user", "infra", "internal"]

UserCode = Literal[
    "invalid_config",
    "invalid_training_file",
    "invalid_validation_file",
    "model_not_found",
    "estimate_exceeded",
    "lora_not_servable",
    "time_limit",
    "nan_loss",
    "unsupported_method",
]
InfraCode = Literal[
    "rank_lost", "rank_hung", "rendezvous_failed", "lease_lost", "disk_full", "out_of_memory", "store_unavailable"
]
InternalCode = Literal["verify_mismatch", "export_failed", "checkpoint_corrupt", "template_mismatch", "bug"]
Code = UserCode | InfraCode | InternalCode

KINDS: dict[str, Kind] = {
    **dict.fromkeys(get_args(UserCode), "user"),
    **dict.fromkeys(get_args(InfraCode), "infra"),
    **dict.fromkeys(get_args(InternalCode), "internal"),
}
"""The kind of every code: a user's mistake is never retried, lost infrastructure is, a bug is not."""

NOT_RETRIED: frozenset[str] = frozenset({"out_of_memory", "disk_full"})
"""Infrastructure failures that a retry would only repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """
    What a job's `error` holds.

    Attributes:
        code: one of `KINDS`.
        message: one sentence: what, where, the value given, what is allowed.
        param: the field of the configuration that is to blame; empty where none is.
        hint: what to do.
        attempt: of the job, from 1; 0 before the first.
        rank: the rank that failed first; -1 where none did.
    """

    code: str
    message: str
    param: str = ""
    hint: str = ""
    attempt: int = 0
    rank: int = -1

    def __post_init__(self) -> None:
        assert self.code in KINDS, self.code

    @property
    def kind(self) -> Kind:
        """Whose fault it is."""
        return KINDS[self.code]

    @property
    def retryable(self) -> bool:
        """Whether another attempt may succeed."""
        return self.kind == "infra" and self.code not in NOT_RETRIED

    def to_json(self) -> dict[str, Any]:
        """The record with its kind, as events, routes and files carry it."""
        return {**asdict(self), "kind": self.kind, "retryable": self.retryable}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> JobError:
        """Read what `to_json` wrote."""
        return cls(**{name: document[name] for name in cls.__slots__ if name in document})


class FinetuneError(Exception):
    """
    A finetuning request or job that cannot go on; `error` is what its owner is told.

    `findings` holds every broken rule where there are several; the message then names the first. `data` is what was
    found out before: the report of a file that cannot be trained on, for example.
    """

    def __init__(
        self, error: JobError, *, findings: tuple[str, ...] = (), data: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(error.message)
        self.error, self.findings, self.data = error, findings, dict(data or {})

    def __str__(self) -> str:
        return f"{self.error.message} {self.error.hint}" if self.error.hint else self.error.message


def refuse(code: Code, message: str, *, param: str = "", hint: str = "", rank: int = -1) -> FinetuneError:
    """A `FinetuneError` to raise."""
    return FinetuneError(JobError(code=code, message=message, param=param, hint=hint, rank=rank))


def bug(where: str) -> JobError:
    """What a job's owner is told of a fault of ours: an id that stands in the log beside the cause, and no more."""
    number = secrets.token_hex(4)
    return JobError(
        code="bug",
        message=f"{where} ended with an internal error, number {number}.",
        hint="The operator finds the number in the job's log.",
    )
