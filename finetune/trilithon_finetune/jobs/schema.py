"""
The tables of the job store, the same on SQLite and PostgreSQL. `migrations/` builds them; a test holds that both agree.

Times are Unix milliseconds by the database's clock. Names of configurations, files' bytes and logs are not here: the
database holds what must be decided in one place, the store's directory everything else.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

# SQLite counts up only a column of exactly this type.
_COUNTER = BigInteger().with_variant(Integer, "sqlite")
_JSON = JSON(none_as_null=True)

jobs = Table(
    "jobs",
    metadata,
    Column("created_seq", _COUNTER, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("tenant", String(256), nullable=False),
    Column("state", String(16), nullable=False),
    Column("desired", String(8), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("config", _JSON, nullable=False),
    Column("resolved", _JSON),
    Column("training_file", String(32), nullable=False),
    Column("validation_file", String(32)),
    Column("attempt", Integer, nullable=False),
    Column("next_attempt", Integer, nullable=False),  # the same as `attempt` where a validated job goes on
    Column("failures", Integer, nullable=False),
    Column("not_before", BigInteger, nullable=False),
    Column("lease_owner", String(128)),
    Column("lease_token", BigInteger, nullable=False),
    Column("lease_expires_at", BigInteger, nullable=False),
    Column("launch_handle", _JSON),
    Column("events_offset", BigInteger, nullable=False),  # bytes of the attempt's events.jsonl that are in the table
    Column("used_ms", BigInteger, nullable=False),  # that workers have spent on it
    Column("last_seq", BigInteger, nullable=False),
    Column("progress", _JSON),
    Column("estimated_finish", BigInteger),
    Column("error", _JSON),
    Column("report", _JSON),
    Column("estimate", _JSON),
    Column("result", _JSON),
    Column("result_files", _JSON),
    Column("seed", BigInteger),
    Column("base_digest", String(128), nullable=False),
    Column("data_digest", String(128), nullable=False),
    Column("template_digest", String(128), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Index("jobs_by_queue", "state", "not_before", "priority"),
    Index("jobs_by_tenant", "tenant", "created_seq"),
    sqlite_autoincrement=True,
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("level", String(8), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("step", BigInteger),  # of events that are thinned by it
    Column("data", _JSON, nullable=False),
)

job_attempts = Table(
    "job_attempts",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("outcome", String(16)),
    Column("cause", Text),
    Column("rank", Integer),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("digest", String(128), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("metrics", _JSON, nullable=False),
    Column("servable", Boolean, nullable=False),
    Column("verified", Boolean, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("created_seq", _COUNTER, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("tenant", String(256), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("filename", String(128), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Index("files_by_tenant", "tenant", "created_seq"),
    Index("files_by_content", "sha256"),
    sqlite_autoincrement=True,
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", String(256), primary_key=True),
    Column("key", String(256), primary_key=True),
    Column("body_digest", String(64), nullable=False),
    Column("job_id", String(32), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)
