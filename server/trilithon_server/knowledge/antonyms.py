"""
Opposites and synonyms of words, from WordNet's antonym pairs and the synsets of its glosses.

Antonymy goes both ways, whichever way a file has it. A word is looked up as it stands and then in its base forms; where
the part of speech is known, only words that can be of that part are taken, those first of which the glosses say so.

Source: WordNet 3.0 (Miller 1995).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trilithon.errors import InvalidArgument
from trilithon_server.http.strict_json import parse_object
from trilithon_server.knowledge.lemmas import known_forms, normalised
from trilithon_server.knowledge.triples import Triple
from trilithon_server.validation import shown

PartOfSpeech = Literal["n", "v", "a", "r"]
"""Noun, verb, adjective, adverb."""

PARTS_OF_SPEECH: tuple[str, ...] = get_args(PartOfSpeech)
ANTONYM = "antonym"


@dataclass(frozen=True, slots=True)
class Synset:
    """Words that mean the same in one sense, the usual one first."""

    part: PartOfSpeech
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Opposite:
    """
    What a keyword was turned into.

    Attributes:
        text: the opposite, or the keyword itself where there is none.
        word, antonym: what was replaced by what; both empty where nothing was.
    """

    keyword: str
    text: str
    word: str = ""
    antonym: str = ""

    @property
    def is_found(self) -> bool:
        """Whether it is another text than the keyword."""
        return bool(self.word)


class WordRelations:
    """
    Antonyms and synonyms by word.

    Args:
        triples: facts, of which those with the relation `antonym` count; the more usual meaning first.
        synsets: in that order too.
    """

    def __init__(self, triples: Iterable[Triple], synsets: Iterable[Synset] = ()) -> None:
        antonyms: dict[str, dict[str, None]] = {}
        for relation, head, tail in triples:
            one, other = normalised(head), normalised(tail)
            if relation == ANTONYM and one != other:
                antonyms.setdefault(one, {})[other] = None
                antonyms.setdefault(other, {})[one] = None
        parts: dict[str, set[str]] = {}
        self._synsets: dict[str, list[Synset]] = {}
        for synset in synsets:
            words = tuple(normalised(word) for word in synset.words)
            for word in words:
                parts.setdefault(word, set()).add(synset.part)
                self._synsets.setdefault(word, []).append(Synset(synset.part, words))
        self._antonyms = {word: tuple(others) for word, others in antonyms.items()}
        self._parts: Mapping[str, set[str]] = parts

    def antonyms(self, word: str, *, part: PartOfSpeech | None = None) -> tuple[str, ...]:
        """
        Opposites of a word, likeliest first; none where none is known.

        Args:
            part: of speech; None: any.
        """
        for form in known_forms(normalised(word), self._antonyms):
            found = self._of_part(self._antonyms[form], part)
            if found:
                return found
        return ()

    def synonyms(self, word: str, *, part: PartOfSpeech | None = None) -> tuple[str, ...]:
        """Words of the same synsets, without the word itself; none where none is known. Arguments as `antonyms`."""
        for form in known_forms(normalised(word), self._synsets):
            synsets = [synset for synset in self._synsets[form] if part in (None, synset.part)]
            others = dict.fromkeys(other for synset in synsets for other in synset.words if other != form)
            if others:
                return tuple(others)
        return ()

    def opposite(self, keyword: str, *, part: PartOfSpeech | None = None) -> Opposite:
        """
        A keyword turned into its opposite: the whole phrase if it has one, else its first word that has.

        >>> WordRelations([("antonym", "good", "bad")]).opposite("the good friend").text
        'bad friend'
        """
        phrase = normalised(keyword)
        words = phrase.split(" ")
        for first, stop in [(0, len(words)), *((i, i + 1) for i in range(len(words)))]:
            word = " ".join(words[first:stop])
            if antonyms := self.antonyms(word, part=part):
                return Opposite(keyword, " ".join([*words[:first], antonyms[0], *words[stop:]]), word, antonyms[0])
        return Opposite(keyword, keyword)

    def _of_part(self, words: Sequence[str], part: PartOfSpeech | None) -> tuple[str, ...]:
        """Those that can be of a part of speech; those that are known to be before those of which nothing is known."""
        if part is None:
            return tuple(words)
        known = [word for word in words if part in self._parts.get(word, ())]
        return (*known, *(word for word in words if word not in self._parts))


def read_synsets(path: Path) -> list[Synset]:
    """
    Synsets of a file, JSON lines of `{"pos", "lemmas", ...}`, in order.

    Raises:
        InvalidArgument: `synsets_invalid`, names the first line that is wrong.
        OSError: the file cannot be read.
    """
    synsets: list[Synset] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = parse_object(line.removesuffix(b"\n"))
            except InvalidArgument as error:
                raise _invalid(path, number, error.message.removeprefix("the body ")) from None
            part, words = row.get("pos"), row.get("lemmas")
            if part not in PARTS_OF_SPEECH:
                raise _invalid(path, number, f"pos must be one of {', '.join(PARTS_OF_SPEECH)}. Given: {shown(part)}.")
            if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
                raise _invalid(path, number, f"lemmas must be a list of words. Given: {shown(words)}.")
            synsets.append(Synset(part, tuple(words)))
    if not synsets:
        raise _invalid(path, 1, "is missing: there must be at least one synset.")
    return synsets


def _invalid(path: Path, number: int, message: str) -> InvalidArgument:
    return InvalidArgument(f"{path.name}:{number} {message}", code="synsets_invalid")
