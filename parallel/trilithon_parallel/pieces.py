"""How vocabularies spell bytes in their pieces: byte-level BPE, SentencePiece's metaspace, word pieces. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

METASPACE = "\u2581"
"""The visible space of SentencePiece: U+2581."""

UNKNOWN_PIECES = ("[UNK]", "<unk>")
"""How vocabularies spell the piece that stands for what they lack."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """
    The 256 visible characters that byte-level BPE writes for bytes, each with its byte.

    Printable Latin-1 stands for itself; every other byte takes the next free character from U+0100 on.

    >>> byte_alphabet()["A"], hex(byte_alphabet()[chr(0x120)])
    (65, '0x20')

    Source: GPT-2 (Radford et al. 2019), `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def spelling_of(document: dict[str, Any]) -> str:
    """How a tokenizer.json spells bytes in its pieces: `byte_level`, `metaspace`, `wordpiece` or `plain`."""
    kinds = set(_component_types(document.get("decoder"))) | set(_component_types(document.get("pre_tokenizer")))
    model = document.get("model")
    model_type = model.get("type") if isinstance(model, dict) else None
    if "ByteLevel" in kinds:
        return "byte_level"
    if "WordPiece" in kinds or model_type == "WordPiece":
        return "wordpiece"
    if "Metaspace" in kinds or "ByteFallback" in kinds or (isinstance(model, dict) and model.get("byte_fallback")):
        return "metaspace"
    return "plain"


def _component_types(component: Any) -> Iterable[str]:
    """The types inside a decoder or pre-tokenizer, sequences opened."""
    if not isinstance(component, dict):
        return
    yield str(component.get("type"))
    for key in ("decoders", "pretokenizers"):
        for inner in component.get(key) or []:
            yield from _component_types(inner)


def piece_table(spelling: str, pieces: Sequence[str], verbatim: dict[int, str]) -> list[bytes]:
    """The bytes of every piece; `verbatim` (added and special tokens) stand for their own text."""
    alphabet = byte_alphabet()

    def spell(piece: str) -> bytes:
        if spelling == "byte_level" and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        if spelling == "metaspace":
            if match := _BYTE_PIECE.fullmatch(piece):
                return bytes([int(match.group(1), 16)])
            return piece.replace(METASPACE, " ").encode()
        if spelling == "wordpiece":
            # A word piece says only whether a space comes before it; the first word's is the caller's to drop.
            return piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
        return piece.encode()

    return [verbatim[i].encode() if i in verbatim else spell(piece) if piece else b"" for i, piece in enumerate(pieces)]
