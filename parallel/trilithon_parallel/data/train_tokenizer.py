"""
Train a vocabulary on texts, and write it as a tokenizer directory that every reader here and there loads.

Of SentencePiece's kinds, `tokenizer.model` is what it trained, and `tokenizer.json` is the same mapping for the
`tokenizers` library. Text survives byte for byte: nothing is normalised, spaces stay, and characters outside the
vocabulary become byte pieces. Word pieces are those of BERT (`word_pieces`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trilithon_parallel.data.documents import Findings, check_inputs, documents_of, read_blocks
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.prepare import BLOCK_BYTES
from trilithon_parallel.data.publish import publish_folder
from trilithon_parallel.data.word_pieces import MIN_VOCAB_SIZE as MIN_WORD_PIECES
from trilithon_parallel.data.word_pieces import train_word_pieces
from trilithon_parallel.pieces import METASPACE
from trilithon_parallel.tokenizer import load_tokenizer

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""Ids 0 to 3 of every vocabulary trained here: unknown, begin, end, padding."""

ALPHABET = "".join(map(chr, range(0x21, 0x7F)))
"""Characters that are pieces whatever the texts hold: printable ASCII."""

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + len(ALPHABET) + 1
"""Special tokens, one piece per byte, the alphabet, and something to learn."""

SentencePieceKind = Literal["bpe", "unigram"]
Kind = Literal["bpe", "unigram", "wordpiece"]

_MAX_LINE = 10_000  # characters of a line that are one sentence to the trainer; its own limit is 2**20 bytes
_MAX_SENTENCES = 2_000_000  # more are sampled: the trainer holds its sentences in memory
_BYTE_SCORE = -1e4  # below the alphabet's letters together, so that a text that spells <0x0A> is not read as a byte


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was trained: the directory, its ids, and what it makes of the texts it saw."""

    path: Path
    vocab_size: int
    digest: str
    num_documents: int
    num_bytes: int


def train_tokenizer(
    inputs: Sequence[Path],
    output: Path,
    *,
    vocab_size: int,
    kind: Kind = "bpe",
    lowercase: bool = False,
    text_key: str = "text",
) -> TrainedTokenizer:
    """
    Train on documents and write a directory: `tokenizer.json`, `tokenizer_config.json`, and `tokenizer.model` of
    SentencePiece or `vocab.txt` of word pieces.

    Args:
        inputs: .jsonl and .txt files, as `prepare` reads them.
        output: a directory that does not exist.
        vocab_size: ids, the special tokens, bytes and letters among them; at least `MIN_VOCAB_SIZE`, or
            `MIN_WORD_PIECES`.
        kind: byte-pair encoding (arXiv 1508.07909), a unigram model (arXiv 1804.10959), or BERT's word pieces.
        lowercase: of word pieces: letters are lowered.
        text_key: the field of a row that holds its text.
    Raises:
        DataError: `data_rows`, `data_exists`, `data_empty`, or `vocab_size` when the texts do not fill so many ids.
    Source: SentencePiece (arXiv 1808.06226); arXiv 1810.04805 for word pieces.
    """
    if kind == "wordpiece":
        least, what = MIN_WORD_PIECES, "5 special tokens and a piece"
    else:
        least = MIN_VOCAB_SIZE
        what = f"{len(SPECIAL_TOKENS)} special tokens, 256 bytes, {len(ALPHABET)} letters and one piece"
    if vocab_size < least:
        raise DataError(f"vocab_size must be at least {least}: {what}. Given: {vocab_size}.", code="vocab_size")
    if lowercase and kind != "wordpiece":
        raise DataError(
            f"lowercase goes with kind wordpiece only; the others keep every text as it is. Given: {kind}.",
            code="tokenizer_kind",
        )
    if output.exists():
        raise DataError(f"{output} exists already.", code="data_exists", hint="Choose another directory.")
    findings = Findings()
    check_inputs(inputs, findings)
    findings.raise_any()
    counted = _Counted()
    lines = _sentences(inputs, text_key, findings, counted)
    try:
        if kind == "wordpiece":
            files: dict[str, str | bytes] = {**train_word_pieces(lines, vocab_size=vocab_size, lowercase=lowercase)}
        else:
            files = _sentence_pieces(lines, vocab_size=vocab_size, kind=kind)
    except (RuntimeError, ValueError, OSError) as error:
        findings.raise_any()
        if not counted.documents:
            raise DataError("the input must hold at least one document with text.", code="data_empty") from None
        if isinstance(error, DataError):
            raise
        raise _explained(str(error), vocab_size) from None
    findings.raise_any()

    def fill(aside: Path) -> None:
        for name, content in files.items():
            (aside / name).write_bytes(content.encode() if isinstance(content, str) else content)

    if not publish_folder(output, fill):
        raise DataError(f"{output} exists already.", code="data_exists", hint="Choose another directory.")
    written = load_tokenizer(output)
    return TrainedTokenizer(output, written.vocab_size, written.digest, counted.documents, counted.bytes)


def _sentence_pieces(lines: Iterator[str], *, vocab_size: int, kind: SentencePieceKind) -> dict[str, str | bytes]:
    """The files of a SentencePiece vocabulary."""
    trained = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)  # decides which sentences of a large input are taken
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines,
        model_writer=trained,
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.9995,
        required_chars=ALPHABET,
        max_sentence_length=1 << 20,
        input_sentence_size=_MAX_SENTENCES,
        shuffle_input_sentence=True,
        num_threads=1,  # sums of several threads depend on their order
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=SPECIAL_TOKENS[0],
        bos_piece=SPECIAL_TOKENS[1],
        eos_piece=SPECIAL_TOKENS[2],
        pad_piece=SPECIAL_TOKENS[3],
        minloglevel=2,
    )
    return {
        "tokenizer.model": trained.getvalue(),
        "tokenizer.json": _hugging_face(trained.getvalue(), kind),
        "tokenizer_config.json": json.dumps(_CONFIG, indent=2) + "\n",
    }


_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **{f"{name}_token": text for name, text in zip(("unk", "bos", "eos", "pad"), SPECIAL_TOKENS, strict=True)},
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


@dataclass
class _Counted:
    documents: int = 0
    bytes: int = 0


def _sentences(inputs: Sequence[Path], text_key: str, findings: Findings, counted: _Counted) -> Iterator[str]:
    """Lines of all documents; the trainer's unit, which pieces never cross."""
    for path in inputs:
        for block in read_blocks(path, block_bytes=BLOCK_BYTES):
            for text in documents_of(block, text_key=text_key, findings=findings):
                if findings.total or not text:
                    continue
                counted.documents += 1
                counted.bytes += len(text.encode())
                # The trainer counts a NUL as the end of a line.
                for line in text.replace("\0", "\n").split("\n"):
                    for at in range(0, len(line), _MAX_LINE):
                        yield line[at : at + _MAX_LINE]


def _explained(message: str, vocab_size: int) -> DataError:
    """The trainer's error in our words, where it names the bound that was crossed."""
    if match := re.search(r"to a value <= (\d+)", message):
        rule, hint = f"at most {match[1]} for these texts", "Choose a smaller vocabulary or give more text."
    elif match := re.search(r"vocab_size.*\d+ vs (\d+)", message, re.DOTALL):
        rule, hint = f"at least {match[1]} for the characters of these texts", "Choose a larger vocabulary."
    else:
        rule, hint = f"one that can be trained ({' '.join(message.split())})", "Give other texts or another size."
    return DataError(f"vocab_size must be {rule}. Given: {vocab_size}.", code="vocab_size", hint=hint)


def _hugging_face(model: bytes, kind: SentencePieceKind) -> str:
    """The same mapping as a tokenizer.json."""
    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    size = processor.GetPieceSize()
    pieces = [processor.IdToPiece(i) for i in range(size)]
    scores = [_BYTE_SCORE if processor.IsByte(i) else processor.GetScore(i) for i in range(size)]
    if kind == "bpe":
        mergeable = [not (processor.IsByte(i) or processor.IsControl(i) or processor.IsUnknown(i)) for i in range(size)]
        converted = tokenizers.Tokenizer(
            models.BPE(
                {piece: i for i, piece in enumerate(pieces)},
                _merges(pieces, scores, mergeable),
                unk_token=SPECIAL_TOKENS[0],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    else:
        vocabulary = list(zip(pieces, scores, strict=True))
        converted = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    # One space before the text, then every space is the visible one. Pieces have it at their beginning only (or
    # are nothing else), so cutting before each run of spaces changes no result, and is what makes it fast.
    converted.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    converted.pre_tokenizer = pre_tokenizers.Split(
        tokenizers.Regex(f"{METASPACE}*[^{METASPACE}]+|{METASPACE}+"), behavior="isolated"
    )
    converted.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    converted.add_special_tokens(list(SPECIAL_TOKENS))
    document: str = converted.to_str(pretty=True)
    return document


def _merges(pieces: list[str], scores: list[float], mergeable: list[bool]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: what SentencePiece looks up by score."""
    ids = {piece: i for i, piece in enumerate(pieces) if mergeable[i]}
    found = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right))
    return [(pieces[left], pieces[right]) for _, left, right in sorted(found)]
