"""
How texts that a model wrote repeat themselves, and what perplexity is by whatever unit. Words are what stands between
spaces.

Source: repetition and distinct n-grams as arXiv 2010.00840 has them (after Shao et al. 2019); entropy of n-grams by
Zhang et al. 2018; perplexity adjusted to words as WikiText evaluations have it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

Ngram = tuple[str, ...]


def repeat_share(texts: Sequence[str], n: int = 4) -> float:
    """
    Share of texts in which some n-gram comes twice; 0 for no texts.

    >>> repeat_share(["a b a b", "a b c d"], n=2)
    0.5
    """
    repeating = sum(max(Counter(ngrams(text, n)).values(), default=0) > 1 for text in texts)
    return repeating / len(texts) if texts else 0.0


def distinct_share(texts: Sequence[str], n: int = 4) -> float:
    """
    Distinct n-grams of all texts together for each n-gram there is; 0 where there is none.

    It falls with the number of texts: compare as many with as many.

    >>> distinct_share(["a b", "a b", "c d"], n=2)
    0.6666666666666666
    """
    counts = _counts(texts, n)
    return len(counts) / counts.total() if counts else 0.0


def ngram_entropy(texts: Sequence[str], n: int = 4) -> float:
    """
    Entropy in nats of the n-grams of all texts together; 0 where there is none.

    >>> ngram_entropy(["a b"], n=1) == math.log(2)
    True
    """
    counts = _counts(texts, n)
    total = counts.total()
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def perplexity(total_loss: float, count: int) -> float:
    """
    exp(loss / count).

    Args:
        total_loss: negative log-likelihood in nats, added over all tokens.
        count: what it is by: tokens, or words (`num_words`) for word perplexity; at least 1.
    """
    assert count >= 1
    return math.exp(total_loss / count)


def adjusted_perplexity(mean_loss: float, *, num_tokens: int, num_words: int) -> float:
    """
    Perplexity by words from a mean loss by tokens: exp(loss * (tokens - 1) / (words - 1)).

    The first token and the first word are predicted from nothing and do not count.

    Args:
        num_tokens, num_words: of the whole text, the words before anything was changed in it; at least 2.
    """
    assert num_tokens >= 2
    assert num_words >= 2
    return math.exp(mean_loss * (num_tokens - 1) / (num_words - 1))


def num_words(texts: Sequence[str]) -> int:
    """Words of all texts together."""
    return sum(len(text.split()) for text in texts)


def ngrams(text: str, n: int) -> Iterator[Ngram]:
    """Runs of n words, in order."""
    words = text.split()
    return zip(*(words[i:] for i in range(n)), strict=False)


def _counts(texts: Sequence[str], n: int) -> Counter[Ngram]:
    return Counter(ngram for text in texts for ngram in ngrams(text, n))
