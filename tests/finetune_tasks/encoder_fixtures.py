"""A WordPiece tokenizer small enough to read, and contexts for recipes: uncased, every letter a piece, a few words."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tokenizers
from tiny_configs import BERT
from tiny_tokenizers import write_json
from tokenizers import models, normalizers, pre_tokenizers, processors

from trilithon_finetune.recipes.base import Context, Recipe
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[unused0]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, UNK = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]"), SPECIAL.index("[UNK]")
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
    )
