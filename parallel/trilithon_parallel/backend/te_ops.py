"""Transformer Engine behind the backend seam: the only module that imports it."""

from __future__ import annotations

import functools


@functools.cache
def unavailable_reason() -> str:
    """Why Transformer Engine cannot be used here; empty where it can."""
    return "not written yet"


class TransformerEngineBackend:
    """Placeholder."""
