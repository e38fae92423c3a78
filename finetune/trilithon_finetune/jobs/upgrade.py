"""Bring a database's schema to this version, step by step, whenever a store is opened; a newer one is refused."""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from trilithon_finetune.errors import refuse

_MIGRATIONS = Path(__file__).with_name("migrations")


def upgrade(connection: Connection) -> None:
    """
    Apply what is missing, in the transaction of `connection`.

    Raises:
        FinetuneError: `store_unavailable`, a newer Trilithon has changed the schema.
    """
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    head = script.get_current_head()
    current = MigrationContext.configure(connection).get_current_revision()
    if current == head:
        return
    if current is not None and current not in {revision.revision for revision in script.walk_revisions()}:
        raise refuse(
            "store_unavailable",
            f"the job store's schema is {current!r}, which this version (schema {head!r}) does not know.",
            hint="A newer Trilithon has opened it: use that one, or another store.",
        )
    context = MigrationContext.configure(connection)
    missing = reversed(list(script.iterate_revisions(head, current)))
    with Operations.context(context):
        for revision in missing:
            revision.module.upgrade()
            context.stamp(script, revision.revision)
