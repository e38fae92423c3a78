"""
Tokenizers behind one protocol: Hugging Face `tokenizer.json` and SentencePiece `tokenizer.model`. Imports no torch.

`token_bytes` gives the exact bytes that a token adds to the text. Incremental detokenisation and constrained output are
built on it, so it is kept by a law that the tests check: joining the bytes of the tokens of a text gives the text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import sentencepiece
import tokenizers

from trilithon_parallel.config import ModelError
from trilithon_parallel.literals import LiteralEncoder, Ranges, alternation, special_ranges
from trilithon_parallel.pieces import METASPACE, piece_table, spelling_of

MAX_VOCAB_SIZE = 1 << 24
"""Ids above this mean a broken file; real vocabularies end below 2**20."""


@runtime_checkable
class Tokenizer(Protocol):
    """
    Text to token ids and back.

    Attributes:
        vocab_size: ids are below this; a model may have more rows (padding), never fewer.
        bos_id: the token that starts a text, or None where the model has none.
        eos_ids: every token that ends an answer; the first is the model's main one. May be empty.
        special_ids: tokens that mark structure (turns, padding); `decode` can leave them out.
        digest: SHA-256 of what defines the mapping, in hex; equal digests tokenise equally.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def digest(self) -> str: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens written out in the text are read as such."""
        ...

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the half-open range of characters it came from; (0, 0) for added tokens."""
        ...

    def encode_with_literals(self, text: str, literals: Ranges) -> tuple[list[int], list[tuple[int, int]]]:
        """
        As `encode_with_offsets` without added tokens, but within the half-open ranges of characters `literals` special
        tokens are not read: their text is text.

        Raises:
            ValueError: the text holds characters that cannot be told from marks; the message goes on from "the text".
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """
        The bytes that this token adds to a text, special tokens included; empty for ids without a piece.

        Raises:
            ValueError: the id is negative or not below `vocab_size`.
        """
        ...

    def id_to_piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token, for people and debugging; empty for ids without a piece."""
        ...


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """
    Open the tokenizer of a model directory: `tokenizer.json` if there is one, else `tokenizer.model`.

    Args:
        model_dir: a directory in Hugging Face layout. No code from it runs.
    Returns:
        The tokenizer, with end tokens from `generation_config.json`, `config.json` and `tokenizer_config.json`.
    Raises:
        ModelError: there is no tokenizer, or a file of it cannot be read.
    """
    settings = _Settings.read(model_dir)
    if (path := model_dir / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path, settings)
    if (path := model_dir / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path, settings)
    raise ModelError(
        "the model directory holds no tokenizer: neither tokenizer.json nor tokenizer.model is there.",
        code="tokenizer_missing",
        hint="Copy the tokenizer files of the model into this directory.",
    )


class _Settings:
    """What the JSON files beside a tokenizer say about its special tokens."""

    def __init__(self, model: dict[str, Any], generation: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        self.model, self.generation, self.tokenizer = model, generation, tokenizer

    @classmethod
    def read(cls, model_dir: Path) -> _Settings:
        names = ("config.json", "generation_config.json", "tokenizer_config.json")
        return cls(*(_read_json_object(model_dir / name) for name in names))

    def token_text(self, key: str) -> str | None:
        """`bos_token` and the like: a string, or an object with `content` in older files."""
        value = self.tokenizer.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def eos_ids(self, piece_to_id: dict[str, int]) -> tuple[int, ...]:
        """All end tokens. The generation config is the model author's word on it, then config, then the tokenizer's."""
        found: list[int] = []
        for source in (self.generation, self.model):
            value = source.get("eos_token_id")
            ids = [value] if isinstance(value, int) else value
            if isinstance(ids, list) and ids:
                found += [item for item in ids if isinstance(item, int)]
                break
        text = self.token_text("eos_token")
        if text is not None and text in piece_to_id:
            found.append(piece_to_id[text])
        return tuple(dict.fromkeys(found))

    def bos_id(self, piece_to_id: dict[str, int]) -> int | None:
        text = self.token_text("bos_token")
        if text is not None and text in piece_to_id:
            return piece_to_id[text]
        for source in (self.generation, self.model):
            value = source.get("bos_token_id")
            if isinstance(value, int):
                return value
        return None

    def special_contents(self) -> list[str]:
        """The texts of every token that `tokenizer_config.json` names as special."""
        keys = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
        named = [text for key in keys if (text := self.token_text(key)) is not None]
        extra = self.tokenizer.get("additional_special_tokens")
        for item in extra if isinstance(extra, list) else []:
            content = item.get("content") if isinstance(item, dict) else item
            if isinstance(content, str):
                named.append(content)
        return named


class HuggingFaceTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: Path, settings: _Settings) -> None:
        raw = path.read_bytes()
        document = _parse_json_object(path, raw)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            # Some faults show only in use; they must show now, not in somebody's request.
            trial = self._tokenizer.encode("a trial", add_special_tokens=True).ids
        except BaseException as error:
            # The library raises bare Exception for most broken files and PanicException, no Exception, for the rest.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelError(
                f"{path.name} is not a tokenizer that the tokenizers library reads: {error}.",
                code="tokenizer_invalid",
                hint="Download the file again, or re-create it with a current tokenizers version.",
            ) from None
        # Files often carry the padding and truncation of their training; serving must see the whole text.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = _checked_size(path, vocabulary.values())
        if trial and max(trial) >= self.vocab_size:
            raise ModelError(
                f"{path.name} must only give ids of its vocabulary, below {self.vocab_size}. Given: {max(trial)}.",
                code="tokenizer_invalid",
                hint="Its post-processor names another id than its vocabulary: download the file again.",
            )
        self.special_ids: frozenset[int] = frozenset(
            [token_id for token_id, token in added.items() if token.special]
            + [vocabulary[text] for text in settings.special_contents() if text in vocabulary]
        )
        self.eos_ids: tuple[int, ...] = settings.eos_ids(vocabulary)
        self.bos_id: int | None = settings.bos_id(vocabulary)
        self.digest: str = hashlib.sha256(raw).hexdigest()
        self._pieces: list[str] = [""] * self.vocab_size
        for piece, token_id in vocabulary.items():
            self._pieces[token_id] = piece
        added_contents = {token_id: token.content for token_id, token in added.items()}
        self._bytes = piece_table(spelling_of(document), self._pieces, added_contents)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    @functools.cached_property
    def _literal(self) -> LiteralEncoder:
        return LiteralEncoder(self._tokenizer.to_str(), self.special_ids)

    def encode_with_literals(self, text: str, literals: Ranges) -> tuple[list[int], list[tuple[int, int]]]:
        if not literals:
            return self.encode_with_offsets(text, add_special_tokens=False)
        return self._literal.encode(text, literals)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        # Skipping is done here: the library skips only what the file itself marks as special.
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[_checked(token_id, self.vocab_size)]

    def id_to_piece(self, token_id: int) -> str:
        return self._pieces[_checked(token_id, self.vocab_size)]


class SentencePieceTokenizer:
    """
    A SentencePiece `tokenizer.model`, with the added tokens that `tokenizer_config.json` lists.

    Special tokens written out in a text (`<s>`, `</s>` and added ones) are read as tokens, as chat templates need;
    the text between them is encoded piece by piece, so each part after a special token starts afresh.
    """

    def __init__(self, path: Path, settings: _Settings) -> None:
        raw = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(raw)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{path.name} is not a SentencePiece model: {' '.join(str(error).split())}.",
                code="tokenizer_invalid",
                hint="Download the file again; if it is a Hugging Face tokenizer, name it tokenizer.json.",
            ) from None
        size = self._model.GetPieceSize()
        pieces = {token_id: self._model.IdToPiece(token_id) for token_id in range(size)}
        control = {i for i in range(size) if self._model.IsControl(i) or self._model.IsUnknown(i)}
        added: dict[int, str] = {}
        special = set(control)
        for token_id, entry in _added_tokens(path, settings):
            content = entry["content"]
            if pieces.get(token_id) != content:
                added[token_id] = content
            if entry.get("special", False):
                special.add(token_id)
        pieces |= added
        self.vocab_size: int = _checked_size(path, pieces)
        self._pieces = [pieces.get(token_id, "") for token_id in range(self.vocab_size)]
        to_id = {piece: token_id for token_id, piece in pieces.items()}
        special |= {to_id[text] for text in settings.special_contents() if text in to_id}
        self.special_ids: frozenset[int] = frozenset(special)
        model_eos, model_bos = self._model.eos_id(), self._model.bos_id()
        self.eos_ids: tuple[int, ...] = settings.eos_ids(to_id) or ((model_eos,) if model_eos >= 0 else ())
        named_bos = settings.bos_id(to_id)
        self.bos_id: int | None = named_bos if named_bos is not None else (model_bos if model_bos >= 0 else None)
        # Llama's defaults: begin with bos, end without eos.
        self._add_bos = bool(settings.tokenizer.get("add_bos_token", True))
        self._add_eos = bool(settings.tokenizer.get("add_eos_token", False))
        verbatim = added | {i: pieces[i] for i in special}
        self._bytes = piece_table("metaspace", self._pieces, verbatim)
        self._verbatim_ids = {content: token_id for token_id, content in verbatim.items() if content}
        self._verbatim = alternation(self._verbatim_ids)
        names = json.dumps([sorted(added.items()), self._add_bos, self._add_eos]).encode()
        self.digest: str = hashlib.sha256(raw + names).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.encode_with_offsets(text, add_special_tokens=add_special_tokens)[0]

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        if add_special_tokens and self._add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
            offsets.append((0, 0))
        text_ids, text_offsets = self.encode_with_literals(text, ())
        ids += text_ids
        offsets += text_offsets
        if add_special_tokens and self._add_eos and self.eos_ids:
            ids.append(self.eos_ids[0])
            offsets.append((0, 0))
        return ids, offsets

    def encode_with_literals(self, text: str, literals: Ranges) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for start, end in [*special_ranges(self._verbatim, text, literals), (len(text), len(text))]:
            if at < start:
                mapping = self._model.EncodeAsOffsetMapping(text[at:start])
                ids += mapping["ids"]
                offsets += [(at + begin, at + stop) for begin, stop in mapping["offsets"]]
            if start < end:
                ids.append(self._verbatim_ids[text[start:end]])
                offsets.append((start, end))
            at = end
        return ids, offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        text = b"".join(self.token_bytes(i) for i in kept).decode("utf-8", errors="replace")
        starts_word = bool(kept) and self._pieces[kept[0]].startswith(METASPACE)
        # The model writes a space before the first word; it was never in the text.
        return text[1:] if starts_word and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[_checked(token_id, self.vocab_size)]

    def id_to_piece(self, token_id: int) -> str:
        return self._pieces[_checked(token_id, self.vocab_size)]


def _added_tokens(path: Path, settings: _Settings) -> Iterable[tuple[int, dict[str, Any]]]:
    """Entries of `added_tokens_decoder`, checked."""
    table = settings.tokenizer.get("added_tokens_decoder") or {}
    for key, entry in table.items() if isinstance(table, dict) else ():
        if not (key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise ModelError(
                f"tokenizer_config.json added_tokens_decoder must map ids to objects with `content`. "
                f"Given: {key!r}: {entry!r}.",
                code="tokenizer_invalid",
                hint="Restore the file that the model was published with.",
            )
        yield int(key), entry


def _checked_size(path: Path, ids: Iterable[int]) -> int:
    """One more than the largest id; tables of this length follow, so a broken file must not choose it freely."""
    size = max(ids, default=-1) + 1
    if not 0 < size <= MAX_VOCAB_SIZE:
        raise ModelError(
            f"{path.name} ids must be from 0 to {MAX_VOCAB_SIZE - 1}, at least one. Given: a vocabulary of {size}.",
            code="tokenizer_invalid",
            hint="Download the file again.",
        )
    return size


def _checked(token_id: int, vocab_size: int) -> int:
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id must be from 0 to {vocab_size - 1}. Given: {token_id}.")
    return token_id


def _read_json_object(path: Path) -> dict[str, Any]:
    return _parse_json_object(path, path.read_bytes()) if path.is_file() else {}


def _parse_json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} is not JSON: {error}.", code="model_invalid", hint="Download it again."
        ) from None
    if not isinstance(document, dict):
        raise ModelError(
            f"{path.name} must hold a JSON object. Given: {type(document).__name__}.",
            code="model_invalid",
            hint="Download it again.",
        )
    return document
