"""Keywords of sentences."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_server.knowledge.keywords import keywords
from trilithon_server.knowledge.word_lists import stop_words

SharedData = Callable[[str], Path]


def peer_keywords(text: str, stops: frozenset[str]) -> list[str]:
    """RAKE once more, from its description: a table of which words stand together, and its row sums."""
    tokens = re.findall(r"[^\W_]+(?:['-][^\W_]+)*|\S", text.lower().replace("\u2019", "'"))
    marked = ["|" if token in stops or not token[0].isalnum() else re.sub(r"'s$", "", token) for token in tokens]
    phrases = [part.split() for part in " ".join(marked).split("|") if part.split()]
    together: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    count: dict[str, int] = defaultdict(int)
    for phrase in phrases:
        for word in phrase:
            count[word] += 1
            for other in phrase:
                together[word][other] += 1
    scored: list[tuple[float, int, str]] = []
    for place, phrase in enumerate(phrases):
        kept = phrase[-3:]
        if " ".join(kept) not in [name for _, _, name in scored]:
            score = sum(sum(together[word].values()) / count[word] for word in kept)
            scored.append((-score, place, " ".join(kept)))
    return [name for _, _, name in sorted(scored)][:3]


SENTENCES = [
    "The old mill stood by the quiet river.",
    "A fox saw some ripe grapes hanging from a high branch.",
    "She baked bread, and the bread was good bread.",
    "He did not know why the small grey dog barked at night.",
    "It is what it is.",
    "Lily's mother gave Lily a bright red umbrella with white dots.",
    "\u201cDon\u2019t go,\u201d said the king; \u201cthe king\u2019s men are coming!\u201d",
    "Well-known people came from far-away towns.",
    "One, two, three: the race began!",
    "In 1954 the wheel was stopped, and in 1960 the wheel was sold.",
    "The boy ran and ran and ran until the boy was tired.",
    "Suddenly heavy rain fell on the dusty market square.",
    "They were happy.",
    "My best friend Tom has a wooden boat and a wooden house.",
    "What a wonderful, wonderful day!",
    "The teacher asked us to draw a picture of our favorite animal.",
    "Max's cat climbed up the tall oak tree behind the red barn.",
    "No one knew where the silver key was hidden.",
    "Caf\u00e9 owner Ren\u00e9 sold fresh cr\u00eapes.",
    "Then, at last, the sun came out and the snow melted away.",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_acc_C02_keywords_equal_a_second_implementation(sentence: str) -> None:
    """
    Twenty sentences give the phrases of an implementation that shares nothing with ours, by the package's stop list.

    Inverse check: with the frequency of a word in the place of its degree over its frequency the order differs.
    """
    assert keywords(sentence) == peer_keywords(sentence, stop_words())


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The old mill stood by the quiet river.", ["old mill stood", "quiet river"]),
        ("She baked bread, and the bread was good bread.", ["baked bread", "good bread", "bread"]),
        ("It is what it is.", []),
        ("Lily's mother gave Lily a red umbrella.", ["mother gave lily", "red umbrella"]),
        ("", []),
        ("?!", []),
    ],
)
def test_acc_C02_golden_keywords(sentence: str, expected: list[str]) -> None:
    """At most three phrases of at most three words, best first; a long run keeps its end."""
    assert keywords(sentence) == expected


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["mill", "Mill's", "the", "river", ",", "well-known", "don't", "of", "\u2019", "1820"])
        | st.text(max_size=4),
        max_size=20,
    ).map(" ".join)
)
def test_acc_C02_any_text_gives_what_a_second_implementation_gives(text: str) -> None:
    """Unicode, signs and empty texts included."""
    found = keywords(text)

    assert found == peer_keywords(text, stop_words())
    assert len(found) <= 3
    assert all(1 <= len(phrase.split(" ")) <= 3 for phrase in found)


def test_limits_are_the_callers() -> None:
    """How many phrases, and how many words of one."""
    text = "Small grey dog, bright red umbrella, old mill."

    assert keywords(text, most=1) == ["small grey dog"]
    assert keywords(text, longest=1) == ["dog", "umbrella", "mill"]


def test_nearly_every_sentence_of_a_story_has_a_keyword(shared_data: SharedData) -> None:
    """What the keyword model is trained on is hardly ever empty."""
    lines = shared_data("stories/five_sentence_stories.jsonl").read_bytes().splitlines()
    found = [keywords(sentence) for line in lines for sentence in json.loads(line)["sentences"]]

    assert sum(map(bool, found)) > 0.98 * len(found)
