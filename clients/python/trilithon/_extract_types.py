"""What finetuned encoders find in texts. Offsets count characters of the text that was sent; ranges are half-open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trilithon._types import Timings, Usage, _Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity(_Answer):
    """A mention: `text` is characters [start, end); `score` is the mean probability of its words' labels."""

    start: int = 0
    end: int = 0
    type: str = ""
    text: str = ""
    score: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told(_Answer):
    """What every answer says beside its result."""

    model: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedText(_Answer):
    """Entities of one text, in its order."""

    entities: tuple[Entity, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations(_Told):
    """One `AnnotatedText` per text."""

    documents: tuple[AnnotatedText, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[AnnotatedText]:
        return iter(self.documents)

    def __getitem__(self, index: int) -> AnnotatedText:
        return self.documents[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityPair(_Answer):
    """Two mentions."""

    a: Entity = field(default_factory=Entity)
    b: Entity = field(default_factory=Entity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation(_Answer):
    """The label of a pair, its probability, and those of all labels."""

    label: str = ""
    score: float = 0.0
    probs: Mapping[str, float] = field(default_factory=dict)
    pair: EntityPair = field(default_factory=EntityPair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relations(_Told):
    """
    One `Relation` per pair. `negative_label` says that a pair is not related; `pairs_dropped` counts pairs of entities
    beyond what one request may ask about.
    """

    relations: tuple[Relation, ...] = ()
    negative_label: str = ""
    pairs_dropped: int = 0

    @property
    def related(self) -> tuple[Relation, ...]:
        """Those whose label is not the negative one."""
        return tuple(relation for relation in self.relations if relation.label != self.negative_label)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanAnswer(_Answer):
    """A possible answer: characters [start, end) of the context with that index."""

    text: str = ""
    probability: float = 0.0
    context: int = 0
    start: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanAnswers(_Told):
    """Candidates, most probable first. `no_answer`: by the model's own threshold the contexts hold no answer."""

    answers: tuple[SpanAnswer, ...] = ()
    no_answer_probability: float = 0.0
    no_answer: bool = False

    @property
    def text(self) -> str:
        """The best answer; empty where there is none."""
        return "" if self.no_answer or not self.answers else self.answers[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified(_Answer):
    """The label of one text, its probability, and those of all; `truncated`: the end of the text was not read."""

    label: str = ""
    score: float = 0.0
    probs: Mapping[str, float] = field(default_factory=dict)
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifications(_Told):
    """One `Classified` per text."""

    results: tuple[Classified, ...] = ()

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Classified]:
        return iter(self.results)

    def __getitem__(self, index: int) -> Classified:
        return self.results[index]
