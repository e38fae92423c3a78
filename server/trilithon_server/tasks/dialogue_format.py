"""
One sequence for a conversation's next turn: references, knowledge and the conversation itself. No torch.

A target actor is given by reference conversations that the actor took part in (arXiv 2005.06114), and what may be said
by sentences of local knowledge (arXiv 2010.10150). The same function packs what a recipe learns and what a server
prompts with:

    references (oldest first) | knowledge | conversation ... turn to be written

Two realisations, named by the model's task file. `text` needs nothing of the model:

    Me: I never drink coffee.
    Them: Not even in the morning?

    Knowledge: Tea was first grown in China.
    Them: What do you drink then?
    Me:

`tokens` needs special tokens in the vocabulary, and with `roles: types` a table of token types in the model: whose turn
it is and which part it belongs to are then types, and nothing of it is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks import writing
from trilithon_server.tasks.task_file import Room, Size, TaskFile

Speaker = Literal["target", "other"]
Part = Literal["references", "knowledge", "conversation"]

REFERENCE_TYPES: dict[Speaker, int] = {"target": 0, "other": 1}
CONVERSATION_TYPES: dict[Speaker, int] = {"target": 2, "other": 3}
KNOWLEDGE_TYPE = 4
NUM_TYPES = 5

TURN, TARGET, OTHER, REFERENCE, KNOWLEDGE = "<|turn|>", "<|tgt|>", "<|oth|>", "<|ref|>", "<|kn|>"
_LABELS: dict[Speaker, str] = {"target": "Me:", "other": "Them:"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; `target` is the actor whose next turn is written."""

    speaker: Speaker
    text: str


Conversation = Sequence[Turn]


class NoRoomError(ValueError):
    """
    What a prompt cannot be without is longer than it may be.

    Attributes:
        needed: tokens of the shortest prompt that there could be.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True, slots=True)
class Dropped:
    """
    What found no room: whole turns of references, sentences of knowledge, whole turns of the conversation, and tokens
    off the front of its last turn.
    """

    references: int = 0
    knowledge: int = 0
    conversation: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Packed:
    """
    A sequence.

    Attributes:
        tokens, positions: one a token. types: likewise; empty where the format has none.
        spans: half-open ranges of tokens that the target actor says in the conversation, each with what ends it.
        references: how many tokens are references.
        knowledge: which of the sentences that were given stand in it, by index.
        answer_type: of the tokens that the model writes behind it.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    types: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    references: int
    knowledge: tuple[int, ...]
    dropped: Dropped
    answer_type: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one turn or sentence; `said`: which of them its speaker says, half-open."""

    tokens: list[int]
    type: int
    said: tuple[int, int] = (0, 0)
    is_turn: bool = True


@dataclass(frozen=True)
class DialogueFormat(TaskFile):
    """
    How a conversation is written down; part of a model's task file.

    Attributes:
        markers: `text`: labels in words. `tokens`: special tokens.
        roles: `types`: who speaks, and where, is told by token types (with `tokens` alone). `markers`: by labels.
        positions: `restart`: each reference and the conversation begin at 0. `running`: 0, 1, 2 ...
        order: which of references and knowledge comes first. References first leaves the cached prefix of an actor
            whole when the knowledge changes.
        max_references, max_knowledge, max_conversation: tokens of each part at most.
    """

    task: ClassVar[str] = "dialogue"

    markers: Literal["text", "tokens"] = "text"
    roles: Literal["types", "markers"] = "markers"
    positions: Literal["restart", "running"] = "running"
    order: Literal["references", "knowledge"] = "references"
    max_references: Room = 96
    max_knowledge: Room = 64
    max_conversation: Size = 160

    def pack(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        *,
        references: Sequence[Conversation] = (),
        knowledge: Sequence[str] = (),
        room: int | None = None,
        open_turn: bool = True,
    ) -> Packed:
        """
        Write one sequence.

        Args:
            conversation: at least one turn.
            references: oldest first; the newest whole turns that fit are kept.
            knowledge: sentences, best first: those that fit are kept, in the order given.
            room: tokens at most; None: as many as the parts may have. Where it is too small the references give way
                first, then the knowledge, then the conversation's oldest turns.
            open_turn: end where the target actor begins to speak, for a model to go on; else end with the last turn.
        Raises:
            NoRoomError: the room does not hold a token of the last turn.
            ValueError: the tokenizer lacks a special token.
        """
        writer = _Writer(self, tokenizer)
        lead, opening = writer.lead(), writer.opening() if open_turn else []
        most = sum((self.max_references, self.max_knowledge, self.max_conversation)) if room is None else room
        left = most - len(lead) - len(opening)
        turns = [writer.turn(turn, CONVERSATION_TYPES[turn.speaker]) for turn in conversation]
        if left < 1:
            message = f"the last turn has {len(turns[-1].tokens)} tokens, and there is room for none of them."
            raise NoRoomError(message, most - left + 1)
        talk = _newest(turns, min(self.max_conversation, left))
        left -= _size(talk)
        facts = [writer.sentence(text) for text in knowledge]
        kept = _first_that_fit(facts, min(self.max_knowledge, left))
        left -= _size([facts[i] for i in kept])
        past = [[writer.turn(turn, REFERENCE_TYPES[turn.speaker]) for turn in item] for item in references]
        memory = _newest_of_all(past, min(self.max_references, left), around=writer.around_reference)
        sequence = _Sequence(restarts=self.positions == "restart")
        sequence.put(lead, 0, begins=True)
        groups = [[facts[i] for i in kept]] if kept else []
        for group in [*memory, *groups] if self.order == "references" else [*groups, *memory]:
            sequence.add(group)
        sequence.add(talk, spoken=True)
        sequence.put(opening, CONVERSATION_TYPES["target"])
        return Packed(
            tokens=tuple(sequence.tokens),
            positions=tuple(sequence.positions),
            types=tuple(sequence.types) if self.roles == "types" else (),
            spans=tuple(sequence.spans),
            references=sum(map(_size, memory)),
            knowledge=tuple(kept),
            dropped=Dropped(
                references=sum(map(len, past)) - sum(piece.is_turn for group in memory for piece in group),
                knowledge=len(facts) - len(kept),
                conversation=len(turns) - len(talk),
                tokens=max(0, len(turns[-1].tokens) - len(talk[-1].tokens)),
            ),
            answer_type=CONVERSATION_TYPES["target"] if self.roles == "types" else 0,
        )

    def special_tokens(self) -> tuple[str, ...]:
        """What a tokenizer must have."""
        if self.markers == "text":
            return ()
        return (REFERENCE, KNOWLEDGE, *((TURN,) if self.roles == "types" else (TARGET, OTHER)))


class _Writer:
    """Turns and sentences as tokens. What callers wrote is never read as a special token."""

    def __init__(self, format: DialogueFormat, tokenizer: Tokenizer) -> None:
        self._format, self._tokenizer = format, tokenizer
        self._in_words = format.markers == "text"
        if self._in_words and format.roles == "types":
            raise ValueError("roles: types needs markers: tokens; labels in words say who speaks.")
        before, behind = ([], self._plain("\n")) if self._in_words else ([self._special(REFERENCE)], [])
        edge = REFERENCE_TYPES["target"]
        self.around_reference = _Piece(before, edge, is_turn=False), _Piece(behind, edge, is_turn=False)

    def lead(self) -> list[int]:
        """What the model's texts begin with."""
        return writing.lead(self._tokenizer)

    def turn(self, turn: Turn, type: int) -> _Piece:
        """One turn, with its label and its end."""
        head = self._label(turn.speaker)
        said = self._said(turn.text)
        return _Piece([*head, *said], type, (len(head), len(head) + len(said)))

    def sentence(self, text: str) -> _Piece:
        """One sentence of knowledge."""
        if self._in_words:
            return _Piece([*self._plain("Knowledge:"), *self._line(text)], KNOWLEDGE_TYPE)
        return _Piece([self._special(KNOWLEDGE), *self._plain(text.strip())], KNOWLEDGE_TYPE)

    def opening(self) -> list[int]:
        """Where the target actor begins to speak."""
        return self._label("target")

    def _label(self, speaker: Speaker) -> list[int]:
        if self._in_words:
            return self._plain(_LABELS[speaker])
        if self._format.roles == "types":
            return [self._special(TURN)]
        return [self._special(TARGET if speaker == "target" else OTHER)]

    def _said(self, text: str) -> list[int]:
        if self._in_words:
            return self._line(text)
        return [*self._plain(text.strip()), self._tokenizer.eos_ids[0]]

    def _line(self, text: str) -> list[int]:
        """What stands behind a label, in one line: a line of the text's own would be somebody else's."""
        return self._plain(f" {writing.one_line(text)}\n")

    def _plain(self, text: str) -> list[int]:
        return writing.literal(text, self._tokenizer)

    def _special(self, name: str) -> int:
        return writing.special(name, self._tokenizer)


@dataclass
class _Sequence:
    """A sequence that grows by its parts."""

    restarts: bool
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, pieces: Sequence[_Piece], *, spoken: bool = False) -> None:
        """A reference, the knowledge, or the conversation, which is `spoken`."""
        for i, piece in enumerate(pieces):
            start, stop = piece.said
            if spoken and piece.type == CONVERSATION_TYPES["target"]:
                self.spans.append((len(self.tokens) + start, len(self.tokens) + stop))
            self.put(piece.tokens, piece.type, begins=i == 0)

    def put(self, tokens: Sequence[int], type: int, *, begins: bool = False) -> None:
        """Tokens of one type; where they begin a part, positions may start over."""
        behind = self.positions[-1] + 1 if self.positions else 0
        first = 0 if begins and self.restarts else behind
        self.positions += range(first, first + len(tokens))
        self.tokens += tokens
        self.types += [type] * len(tokens)


def _size(pieces: Sequence[_Piece]) -> int:
    return sum(len(piece.tokens) for piece in pieces)


def _newest(turns: Sequence[_Piece], room: int) -> list[_Piece]:
    """The last whole turns that fit in one token or more; the very last is kept, cut at its front where too long."""
    *_, last = turns
    if len(last.tokens) > room:
        cut = len(last.tokens) - room
        said = max(0, last.said[0] - cut), last.said[1] - cut
        return [_Piece(last.tokens[cut:], last.type, said)]
    kept: list[_Piece] = []
    for turn in reversed(turns):
        if (room := room - len(turn.tokens)) < 0:
            break
        kept.append(turn)
    return kept[::-1]


def _first_that_fit(sentences: Sequence[_Piece], room: int) -> list[int]:
    """Indices of the sentences that fit, in the order of their worth; each is taken or left whole."""
    kept = []
    for index, sentence in enumerate(sentences):
        if len(sentence.tokens) <= room:
            kept.append(index)
            room -= len(sentence.tokens)
    return kept


def _newest_of_all(
    conversations: Sequence[Sequence[_Piece]], room: int, *, around: tuple[_Piece, _Piece]
) -> list[list[_Piece]]:
    """The newest whole turns of all conversations that fit, each conversation between the pieces `around` it."""
    groups: list[list[_Piece]] = []
    for conversation in reversed(conversations):
        if (room := room - _size(around)) < 0:
            break
        kept: list[_Piece] = []
        for turn in reversed(conversation):
            if (left := room - len(turn.tokens)) < 0:
                break
            kept.append(turn)
            room = left
        if kept:
            groups.append([around[0], *kept[::-1], around[1]])
        if len(kept) < len(conversation):
            break
    return groups[::-1]
