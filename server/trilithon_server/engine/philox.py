"""
Counter-based randomness: one uniform per (seed, choice, position), the same in any batch, layout or run (E5).

Source: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """
    Ten rounds of Philox4x32: four 32-bit words from a 128-bit counter and a 64-bit key.

    >>> [hex(word) for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (product_1 >> 32) ^ c1 ^ k0, product_1 & _MASK, (product_0 >> 32) ^ c3 ^ k1, product_0 & _MASK
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, *, choice: int, position: int) -> float:
    """
    The uniform number in [0, 1) that draws the token at `position` of answer `choice`; 53 random bits.

    Args:
        seed: 0..2^64-1.
        choice: index of the answer among those of one request.
        position: absolute index of the drawn token in prompt + answer.
    """
    words = philox4x32((position & _MASK, position >> 32, choice, 0), (seed & _MASK, (seed >> 32) & _MASK))
    return ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53
