"""
Keys of the prefix cache: a chain of hashes, one per full block of tokens.

A block's key covers its tokens, their types and positions, every block before it, the weights, the adapter and the
tenant's salt, so equal keys mean equal keys and values in the cache, and another tenant's prompt can never match (E3,
S8).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 16


def root_key(*, model_digest: str, adapter_digest: str, salt: bytes) -> bytes:
    """The parent of a prompt's first block. Lengths are hashed too, so that no two triples run together."""
    digest = hashlib.sha256()
    for part in (model_digest.encode(), adapter_digest.encode(), salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()[:KEY_BYTES]


def source_keys(root: bytes, tokens: Sequence[int], *, block_size: int) -> list[bytes]:
    """
    The keys of a source's blocks: all of them cover all of its tokens, since an encoder looks both ways.

    >>> a, b = source_keys(b"r", [1, 2, 3], block_size=2)
    >>> a != b, a == source_keys(b"r", [1, 2, 4], block_size=2)[0]
    (True, False)
    """
    whole = hashlib.sha256(b"source" + root)
    whole.update(array("q", tokens).tobytes())
    count = -(-len(tokens) // block_size)
    return [hashlib.sha256(whole.digest() + array("q", [i]).tobytes()).digest()[:KEY_BYTES] for i in range(count)]


def reading_root(root: bytes, sources: Sequence[tuple[bytes, float]]) -> bytes:
    """The parent of a prompt that is read with sources: the first key and the bias of each."""
    if not sources:
        return root
    digest = hashlib.sha256(b"reading" + root)
    for key, bias in sources:
        digest.update(key)
        digest.update(array("d", [bias]).tobytes())
    return digest.digest()[:KEY_BYTES]


def block_key(
    parent: bytes, tokens: Sequence[int], *, types: Sequence[int] = (), positions: Sequence[int] = ()
) -> bytes:
    """
    The key of a full block.

    Positions that count from 0 need no bytes of their own: a block's place follows from its chain of parents. Nor do
    types that are all zero.

    >>> root = root_key(model_digest="m", adapter_digest="", salt=b"")
    >>> block_key(root, [1, 2]) == block_key(root, [1, 2]), block_key(root, [1, 2]) == block_key(root, [2, 1])
    (True, False)
    """
    digest = hashlib.sha256(parent)
    digest.update(array("q", tokens).tobytes())
    for name, numbers in ((b"types", types), (b"positions", positions)):
        if numbers:
            digest.update(name)
            digest.update(array("q", numbers).tobytes())
    return digest.digest()[:KEY_BYTES]
