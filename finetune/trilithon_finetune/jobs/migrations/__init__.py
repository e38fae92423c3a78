"""The schema, step by step: one module a step in `versions/`, in the order that alembic reads from them."""
