"""Types of the fixtures in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from trilithon_finetune.recipes.base import Context

MakeContext: TypeAlias = Callable[..., Context]
WriteRows: TypeAlias = Callable[..., Path]
