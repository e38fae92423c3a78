"""The tasks that a job can have: one module each, and the table of them."""

from __future__ import annotations

from trilithon_finetune.recipes.base import Recipe
from trilithon_finetune.recipes.classify import Classify
from trilithon_finetune.recipes.relation import Relation
from trilithon_finetune.recipes.span_qa import SpanQa
from trilithon_finetune.recipes.token_tagging import TokenTagging

RECIPES: dict[str, Recipe] = {
    "ner": TokenTagging(),
    "relation": Relation(),
    "classify": Classify(),
    "span_qa": SpanQa(),
}
"""Recipe by task name."""
