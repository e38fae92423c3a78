"""The tasks that a job can have: one module each, and the table of them."""

from __future__ import annotations

from trilithon_finetune.recipes.base import Recipe

RECIPES: dict[str, Recipe] = {}
"""Recipe by task name."""
