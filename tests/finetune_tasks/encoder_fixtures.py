"""A WordPiece tokenizer small enough to read (uncased, every letter a piece), and rows and contexts of recipes."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tiny_configs import BERT
from tiny_tokenizers import write_json
from tokenizers import models, normalizers, pre_tokenizers, processors

from trilithon_finetune.data.findings import Finding
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import Context, Recipe, Sample
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[unused0]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, UNK = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]"), SPECIAL.index("[UNK]")
NER, RELATION, CLASSIFY, SPANS = (RECIPES[name] for name in ("ner", "relation", "classify", "span_qa"))

TAGGED = {"tokens": ["Aspirin", "inhibits", "COX"], "tags": ["B-C", "O", "B-G"]}
RELATED = {
    "text": "Aspirin inhibits COX.",
    "a": {"start": 0, "end": 7, "type": "CHEMICAL"},
    "b": {"start": 17, "end": 20, "type": "GENE"},
    "label": "CPR:4",
}
ASKED = {
    "context": "the aspirin of it, the pain",
    "question": "who?",
    "answers": [{"text": "aspirin", "answer_start": 4}],
}
LABELLED = {"text": "the pain", "label": "yes"}

WORDS = ["aspirin", "inhibits", "cox", "the", "who", "wrote", "it", "pain", "of", "in", "and"]


def letter_tokenizer(directory: Path) -> Tokenizer:
    """`aspirin` is one piece, `aspirins` two, any other ASCII word as many as it has letters."""
    signs = string.ascii_lowercase + string.digits
    entries = [*SPECIAL, *WORDS, *signs, *(f"##{sign}" for sign in signs), *"!.,;:()[]-@$%'\"?/"]
    vocabulary = {piece: i for i, piece in enumerate(entries)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([piece for piece in SPECIAL if "unused" not in piece])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    return load_tokenizer(directory)


def context_for(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    labels: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    on_long: Any = "error",
    validating: bool = False,
) -> Context:
    """A context with the recipe's defaults; the model's shape does not matter to encoder tasks."""
    return Context(
        tokenizer,
        None,
        BERT,
        max_tokens or recipe.defaults.max_tokens,
        labels,
        recipe.Options.model_validate(options or {}),
        on_long=on_long,
        validating=validating,
    )


def context_of(recipe: Recipe, tokenizer: Tokenizer, rows: list[Mapping[str, Any]], **more: Any) -> Context:
    """Labels are those of the rows, and one besides where that is a single one."""
    options = recipe.Options.model_validate(more.get("options", {}))
    single = recipe in (RELATION, CLASSIFY) and len({row["label"] for row in rows}) == 1
    known = [*rows, {"label": "false"}] if single else rows
    return context_for(recipe, tokenizer, labels=recipe.labels(known, options), **more)


def samples_of(found: list[Sample] | list[Finding]) -> list[Sample]:
    assert all(isinstance(item, Sample) for item in found), found
    return [item for item in found if isinstance(item, Sample)]
