"""Lists in pages: newest first, behind a cursor that is an id."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, RowMapping, Select, Table, select

from trilithon.errors import InvalidArgument, NotFound, Violation
from trilithon_finetune.jobs.records import Page

MAX_LIMIT = 100

T = TypeVar("T")


def check_limit(limit: int, *, most: int = MAX_LIMIT) -> None:
    """Raises InvalidArgument where `limit` is not from 1 to `most`."""
    if not 1 <= limit <= most:
        message = f"limit must be from 1 to {most}. Given: {limit}."
        raise InvalidArgument(message, details=[Violation(field="limit", code="out_of_range", message=message)])


def page_of(
    connection: Connection,
    query: Select[*tuple[object, ...]],
    table: Table,
    *,
    after: str | None,
    limit: int,
    tenant: str,
    record: Callable[[RowMapping], T],
) -> Page[T]:
    """
    A page of a tenant's rows.

    Args:
        query: of `table`, without an order; `created_seq` and `id` are its columns.
        after: id of the last row of the page before.
    Raises:
        InvalidArgument: `limit` is out of range. NotFound: `after` is not this tenant's.
    """
    check_limit(limit)
    if after is not None:
        cursor = select(table.c.created_seq).where(table.c.id == after, table.c.tenant == tenant)
        found = connection.execute(cursor).scalar_one_or_none()
        if found is None:
            raise NotFound(f"after names nothing of yours. Given: {after[:64]!r}.", code="cursor_not_found")
        query = query.where(table.c.created_seq < found)
    rows = connection.execute(query.order_by(table.c.created_seq.desc()).limit(limit + 1)).mappings().all()
    return Page(tuple(record(row) for row in rows[:limit]), has_more=len(rows) > limit)
