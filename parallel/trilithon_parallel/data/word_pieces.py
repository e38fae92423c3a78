"""
A WordPiece vocabulary, which encoders of the BERT family read: words are cut into pieces, no byte falls back.

Text is cleaned and split as BERT does it: at spaces and around punctuation, accents off where letters are lowered.
Letters are merged by frequency, by SentencePiece, whose pieces are then spelt as word pieces; its training is
repeatable, which that of `tokenizers` is not. A word with a letter that the vocabulary lacks is [UNK] whole.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.pieces import METASPACE

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Ids 0 to 4 of every vocabulary trained here."""

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 1
"""The letters of the texts, at the beginning of words and within them, need more: the error says how many."""

MIN_FREQUENCY = 2
"""A letter that stands in fewer places is left to [UNK]."""

_META = 3  # pieces that SentencePiece adds: unknown, begin, end
_MAX_CHARS = 100  # of a word, as in BERT's files; longer ones are [UNK]


def train_word_pieces(lines: Iterable[str], *, vocab_size: int, lowercase: bool) -> dict[str, str]:
    """
    Args:
        lines: of text.
        vocab_size: ids, the special tokens among them.
        lowercase: letters are lowered and lose their accents.
    Returns:
        `tokenizer.json`, `tokenizer_config.json` and `vocab.txt`, by name.
    Raises:
        DataError: `vocab_size`: the texts' letters need more ids, or the texts don't fill so many.
    Source: Devlin et al. 2019 (arXiv 1810.04805).
    """
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab={}, unk_token=SPECIAL_TOKENS[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    words = Counter(_words(lines, tokenizer))
    vocabulary = _vocabulary(words, vocab_size)
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer.model = models.WordPiece(vocab=ids, unk_token=SPECIAL_TOKENS[1], max_input_chars_per_word=_MAX_CHARS)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    _, _, cls, sep, _ = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(_config(lowercase=lowercase), indent=2) + "\n",
        "vocab.txt": "".join(f"{piece}\n" for piece in vocabulary),
    }


def _words(lines: Iterable[str], tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    for line in lines:
        normal = tokenizer.normalizer.normalize_str(line)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            if len(word) <= _MAX_CHARS:
                yield word


def _vocabulary(words: Counter[str], vocab_size: int) -> list[str]:
    """Special tokens, letters, letters within words, then pieces as they were merged."""
    places: Counter[str] = Counter()
    for word, count in words.items():
        places.update({letter: count * word.count(letter) for letter in set(word)})
    letters = sorted(letter for letter, count in places.items() if count >= MIN_FREQUENCY and letter != METASPACE)
    base = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    if vocab_size <= len(base):
        raise DataError(
            f"vocab_size must be at least {len(base) + 1} for the characters of these texts. Given: {vocab_size}.",
            code="vocab_size",
            hint="Choose a larger vocabulary.",
        )
    known = set(letters)
    spelt = sorted((word, count) for word, count in words.items() if known.issuperset(word))
    # A letter that begins a word is a merge there and a letter here, so that many more are asked for.
    merged = _merges(spelt, vocab_size - len(base) + 2 * len(letters) + 1 + _META) if spelt else []
    pieces = [piece[1:] if piece.startswith(METASPACE) else f"##{piece}" for piece in merged]
    vocabulary = list(dict.fromkeys([*base, *filter(None, pieces)]))[:vocab_size]
    if len(vocabulary) < vocab_size:
        raise DataError(
            f"vocab_size must be at most {len(vocabulary)} for these texts. Given: {vocab_size}.",
            code="vocab_size",
            hint="Choose a smaller vocabulary or give more text.",
        )
    return vocabulary


def _merges(words: Sequence[tuple[str, int]], num_pieces: int) -> list[str]:
    """SentencePiece's pieces, best first; fewer where the words don't hold so many."""
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([f"{word}\t{count}" for word, count in words]),
            input_format="tsv",
            model_writer=trained,
            model_type="bpe",
            vocab_size=num_pieces,
            normalization_rule_name="identity",
            character_coverage=1.0,
            max_sentencepiece_length=_MAX_CHARS,
            split_by_unicode_script=False,
            split_by_number=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if match := re.search(r"to a value <= (\d+)", str(error)):
            return _merges(words, int(match[1]))
        raise
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(trained.getvalue())
    return [processor.IdToPiece(i) for i in range(_META, processor.GetPieceSize())]


def _config(*, lowercase: bool) -> dict[str, object]:
    names = ("pad", "unk", "cls", "sep", "mask")
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        **{f"{name}_token": token for name, token in zip(names, SPECIAL_TOKENS, strict=True)},
    }
