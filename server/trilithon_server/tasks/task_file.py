"""A format as a task file: a dataclass's fields, each checked by its annotation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

Size = Annotated[int, Field(ge=1)]
Room = Annotated[int, Field(ge=0)]
"""A size that may be nothing."""


@dataclass(frozen=True)
class TaskFile:
    """
    What formats share whose fields are texts, numbers, choices and true or false. `task`: what the file calls it.
    `added`: fields that older files lack, so that their defaults hold.
    """

    task: ClassVar[str]
    added: ClassVar[tuple[str, ...]] = ()

    def task_file(self) -> dict[str, JsonValue]:
        """What `from_task_file` reads."""
        return {"task": self.task, **asdict(self)}

    @classmethod
    def from_task_file(cls, document: Mapping[str, Any]) -> Self:
        """
        The format of a `task.json`.

        Raises:
            ValueError, KeyError, TypeError: it is not one that `task_file` writes.
        """
        names = [field.name for field in fields(cls) if field.name in document or field.name not in cls.added]
        values = {name: document[name] for name in names}
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}. Given: {first['input']!r}") from None
