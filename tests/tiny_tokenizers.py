"""Small real tokenizers for the tiny models: byte-level BPE with chat tokens, WordPiece, and T5's metaspace."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""Ids 0, 1 and 2 of the tiny causal tokenizers, as in SmolLM2."""

_TEXT = [
    "The old mason set two stones upright and laid a third across them, and the people of the village came to look.",
    "What holds it up? asked the child. Weight holds it up, said the mason, and care, and the ground below.",
    "In winter the river froze; in spring it ran again, and the miller counted 12 sacks, then 144, then 1,728.",
    "She wrote the letter twice, once in ink and once in pencil, because nobody could say which would last longer.",
    'Numbers like 3.14159 and 2026, names like Ada and Noor, marks like (this) or [that] or "those" all have a place.',
    "user: how far is the sea? assistant: two days on foot, one day by cart, and no time at all in a story.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n",
    '{"name": "trilithon", "stones": 3, "upright": true, "weights": [25.0, 25.5, 6.75]}\n',
]


def write_bpe_tokenizer(
    path: Path, *, vocab: int, context: int, chat_template: bool, bos: str = TURN_START, eos: str = TURN_END
) -> None:
    (path / "tokenizer.json").write_text(_bpe_tokenizer(vocab), encoding="utf-8")
    document: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": END_OF_TEXT,
        "pad_token": eos,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(path / "tokenizer_config.json", document)


def add_special_tokens(path: Path, names: Sequence[str], *, first: int) -> None:
    """Give the tokenizer in a directory special tokens with the ids from `first` on."""
    document: dict[str, Any] = json.loads((path / "tokenizer.json").read_text("utf-8"))
    like = document["added_tokens"][0]
    document["added_tokens"] += [{**like, "id": first + i, "content": name} for i, name in enumerate(names)]
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")


@functools.cache
def _bpe_tokenizer(vocab: int) -> str:
    special = [END_OF_TEXT, TURN_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab < len(alphabet) + len(special):
        seen = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
            "".join(map(chr, range(0x20, 0x7F))) + "\n\t"
        )
        alphabet = sorted({character for piece, _ in seen for character in piece})
    if vocab < len(alphabet) + len(special):
        raise ValueError(f"vocab must be at least {len(alphabet) + len(special)}. Given: {vocab}.")
    return _learned(_TEXT, vocab, special, sorted(alphabet))


def retrain_bpe_tokenizer(path: Path, texts: Sequence[str], *, vocab: int) -> None:
    """Give a directory of `write_bpe_tokenizer` a vocabulary of the words of these texts."""
    special, alphabet = [END_OF_TEXT, TURN_START, TURN_END], sorted(pre_tokenizers.ByteLevel.alphabet())
    (path / "tokenizer.json").write_text(_learned(texts, vocab, special, alphabet), encoding="utf-8")


def _learned(texts: Sequence[str], vocab: int, special: list[str], alphabet: list[str]) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _fill(tokenizer, vocab)
    text: str = tokenizer.to_str()
    return text


def write_wordpiece_tokenizer(path: Path, *, vocab: int, context: int) -> None:
    (path / "tokenizer.json").write_text(_wordpiece_tokenizer(vocab), encoding="utf-8")
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
            "model_max_length": context,
        },
    )


@functools.cache
def _wordpiece_tokenizer(vocab: int) -> str:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = collections.Counter(
        word for text in _TEXT for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    letters = sorted({letter for word in counts for letter in word})
    # Not trained: the library's word-piece trainer breaks ties by hash order, so its result differs by process.
    words = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if len(word) > 1]
    pieces = (special + letters + [f"##{letter}" for letter in letters] + words)[:vocab]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    _fill(tokenizer, vocab)
    text: str = tokenizer.to_str()
    return text


def write_metaspace_tokenizer(path: Path, *, vocab: int) -> None:
    """As T5's: spaces are part of words, `</s>` (id 1) ends a text, `<pad>` (id 0) begins an answer."""
    (path / "tokenizer.json").write_text(_metaspace_tokenizer(vocab), encoding="utf-8")
    document = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(path / "tokenizer_config.json", {**document, "unk_token": "<unk>"})


@functools.cache
def _metaspace_tokenizer(vocab: int) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(map(chr, range(0x21, 0x7F))),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    _fill(tokenizer, vocab)
    text: str = tokenizer.to_str()
    return text


def _fill(tokenizer: tokenizers.Tokenizer, vocab: int) -> None:
    """Reserve what the text was too short to fill, so that every row of the model has a token."""
    missing = vocab - tokenizer.get_vocab_size()
    if missing < 0:
        raise ValueError(f"vocab must be at least {tokenizer.get_vocab_size()}. Given: {vocab}.")
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(missing)])


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write JSON for people: indented, keys sorted."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
