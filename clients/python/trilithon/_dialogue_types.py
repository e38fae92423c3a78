"""What a conversation's next turn is told with."""

from __future__ import annotations

from dataclasses import dataclass, field

from trilithon._types import Timings, Usage, _Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(_Answer):
    """A turn, the mean of its tokens' log-probabilities, and why it ended."""

    text: str = ""
    mean_logprob: float = 0.0
    finish_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeUsed(_Answer):
    """
    A sentence that the prompt held: the document's `sentence`-th, counted from 0, and its score by the scorer.

    `generated`: the model wrote it itself, and no document says it.
    """

    text: str = ""
    document_id: str = ""
    sentence: int = 0
    score: float = 0.0
    generated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyDelta(_Answer):
    """More text of the first candidate."""

    delta: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(_Answer):
    """
    The next turn.

    Attributes:
        candidates: as many as were asked for.
        knowledge: the sentences used, in the order of the prompt.
        reference_tokens: of the prompt, taken by references.
        turns_dropped, reference_turns_dropped, knowledge_dropped: what found no room.
        model: the served model that answered.
    """

    candidates: tuple[Candidate, ...] = ()
    knowledge: tuple[KnowledgeUsed, ...] = ()
    reference_tokens: int = 0
    turns_dropped: int = 0
    reference_turns_dropped: int = 0
    knowledge_dropped: int = 0
    model: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    @property
    def text(self) -> str:
        """The first candidate's turn."""
        return self.candidates[0].text if self.candidates else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor(_Answer):
    """What is kept of an actor; `version` grows with every replacement."""

    actor_id: str = ""
    conversations: int = 0
    turns: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeBase(_Answer):
    """What a knowledge base holds; `version` grows with every change."""

    documents: int = 0
    sentences: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing(_Answer):
    """The answer of what only takes away."""
