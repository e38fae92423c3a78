"""
Tasks `dialogue` and `grounded_dialogue`: speak as an actor whose earlier conversations are given, and, grounded, of
what sentences of knowledge say. Rows are

    {"actor": "u1",
     "target": [{"author": "u2", "text": "..."}, {"author": "u1", "text": "..."}],
     "refs": [[{"author", "text"}, ...], ...],
     "knowledge": [{"text": "..."}, ...]}

The actor's turns of the conversation are learned but for those with `"weight": 0`, of a grounded one the last of these.
Names of authors never reach the model, which knows `Me` and `Them`.

Source: arXiv 2005.06114 (actors by references), 2010.10150 (local knowledge).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.metrics.knowledge_f1 import mean_word_f1
from trilithon_finetune.recipes.base import Context, Defaults, Head, Needs, Output, Recipe, Sample, Writing
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_finetune.recipes.texts import next_token_targets, untrained_end
from trilithon_server.tasks.dialogue_format import NUM_TYPES, DialogueFormat, Packed, Turn

ROWS = "actor/target/refs"
KEYS = ("actor", "target", "refs", "knowledge", "id", "ts")
TURN_KEYS = ("author", "text")
LEARNED_KEYS = (*TURN_KEYS, "weight")
KNOWLEDGE_KEYS = ("text", "doc_id", "sent_idx", "score", "selected_by")
TURN_END = "\n"


class DialogueOptions(Section):
    """Options of the tasks `dialogue` and `grounded_dialogue`."""

    reference_tokens: Annotated[int, Field(ge=0)] = 96
    """Of the actor's earlier conversations, at most: the newest whole turns that fit."""
    knowledge_tokens: Annotated[int, Field(ge=0)] = 64
    """Of the sentences of knowledge, at most."""
    conversation_tokens: Annotated[int, Field(ge=16)] = 160
    """Of the conversation, at most: its last turns."""
    markers: Literal["text", "tokens"] = "text"
    """Who speaks, and what is knowledge, in words or by special tokens, which the base's tokenizer must have."""
    roles: Literal["markers", "types"] = "markers"
    """Who speaks is said by those, or (`markers: tokens`) by token types."""
    positions: Literal["running", "restart"] = "running"
    """Positions run through, or each earlier conversation and this one begin at 0."""
    order: Literal["references", "knowledge"] = "references"
    """Which of the earlier conversations and the knowledge comes first."""
    written_answers: Annotated[int, Field(ge=0)] = 40
    """Validation turns, at most, that the export writes itself, for `f1` and `knowledge_f1`; 0: none."""

    @model_validator(mode="after")
    def _roles_fit(self) -> Self:
        if self.roles == "types" and self.markers == "text":
            raise ValueError("roles: types needs markers: tokens; labels in words say who speaks")
        return self


class Dialogue(Recipe):
    """The recipe of `dialogue`: knowledge in a row is left aside."""

    task = "dialogue"
    head: Head = "vocabulary"
    formats: tuple[str, ...] = (ROWS,)
    defaults = Defaults(lr_full=2e-5, max_tokens=384, warmup_ratio=0.05, betas=(0.9, 0.95))
    Options: type[Section] = DialogueOptions
    best_metric: Best = ("valid_loss", "min")
    is_grounded = False

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By its actor or its conversation."""
        return ROWS if "actor" in row or "target" in row else None

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A conversation in which the actor speaks, and earlier ones."""
        check = RowCheck(row, file=file, line=line)
        check.keys(KEYS)
        actor = check.text("actor")
        target = check.value("target", list)
        authors = _check_turns("target", target, check, actor=actor)
        if actor is not None and authors is not None and actor not in authors:
            rule = (
                f"has no turn of the actor {shown(actor)}, so there is nothing to learn. Authors: {', '.join(authors)}."
            )
            check.add("E-DATA-022", "target", rule)
        elif actor is not None and authors is not None and not any(_is_learned(turn, actor) for turn in target):
            rule = f"every turn of the actor {shown(actor)} has the weight 0, so there is nothing to learn."
            check.add("E-DATA-022", "target", rule)
        for i, conversation in enumerate(check.value("refs", list) or () if "refs" in row else ()):
            path = f"refs[{i}]"
            if not isinstance(conversation, list):
                check.add("E-DATA-008", path, f"must be a list of turns. Given: {shown(conversation)}.")
                continue
            _check_turns(path, conversation, check)
        for i, item in enumerate(check.value("knowledge", list) or () if "knowledge" in row else ()):
            path = f"knowledge[{i}]"
            if not isinstance(item, dict):
                check.add("E-DATA-008", path, f"must be an object with text. Given: {shown(item)}.")
                continue
            check.keys(KNOWLEDGE_KEYS, row=item, path=path)
            check.text(f"{path}.text", row=item)
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """
        The conversation up to the actor's last turn that is learned, packed with what it stands on.

        To judge, and where there is knowledge, which is that turn's, the last of them alone.
        """
        packed = self._packed(row, context)
        spoken = [turn for turn in row["target"][: _end(row)] if turn["author"] == row["actor"]]
        kept = zip(packed.spans, spoken[-len(packed.spans) :], strict=True)
        spans = [span for span, turn in kept if _is_learned(turn, row["actor"])]
        spans = spans[-1:] if context.validating or self.is_grounded else spans
        supervised = [False] * len(packed.tokens)
        for start, stop in spans:
            supervised[start:stop] = [True] * (stop - start)
        if not any(supervised[1:]):
            rule = f"the actor's turn has no token within {context.max_tokens} (data.max_tokens)."
            return [finding("E-DATA-022", rule, file=file, line=line, path="target", hint="Raise data.max_tokens.")]
        sample = Sample(
            packed.tokens,
            next_token_targets(packed.tokens, supervised),
            types=packed.types,
            positions=packed.positions if _options(context).positions == "restart" else (),
            row=line,
            cut=packed.dropped.tokens,
        )
        return [sample, *untrained_end(context, file=file, line=line)]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """The loss says it all while training."""
        return {}

    def needs(self, options: Section) -> Needs:
        """Markers, and types where they say who speaks."""
        assert isinstance(options, DialogueOptions)
        types = NUM_TYPES if options.roles == "types" else 0
        return Needs(_format(options).special_tokens(), types)

    def writing(self, context: Context) -> Writing | None:
        """So many turns; one in words is a line."""
        options = _options(context)
        stops = (TURN_END,) if options.markers == "text" else ()
        return Writing(options.written_answers, stops) if options.written_answers else None

    def judge(
        self, texts: Mapping[int, str], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`f1` of words shared with the true turn, `knowledge_f1` with the knowledge given, `written_answers`."""
        said = {line: text.strip() for line, text in texts.items()}
        golds = [_told(rows[line])[-1].text for line in said]
        numbers = {"f1": mean_word_f1(list(said.values()), golds), "written_answers": float(len(said))}
        if self.is_grounded:
            known = [" ".join(_facts(rows[line])) for line in said]
            numbers["knowledge_f1"] = mean_word_f1(list(said.values()), known)
        return numbers

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `DialogueFormat` reads."""
        return _format(_options(context)).task_file()

    def _packed(self, row: Mapping[str, Any], context: Context) -> Packed:
        references = [[_turn(turn, row["actor"]) for turn in item] for item in row.get("refs", ())]
        return _format(_options(context)).pack(
            _told(row),
            context.tokenizer,
            references=references,
            knowledge=_facts(row) if self.is_grounded else (),
            room=context.max_tokens,
            open_turn=False,
        )


class GroundedDialogue(Dialogue):
    """The recipe of `grounded_dialogue`."""

    task = "grounded_dialogue"
    is_grounded = True


def _options(context: Context) -> DialogueOptions:
    options = context.options
    assert isinstance(options, DialogueOptions)
    return options


def _format(options: DialogueOptions) -> DialogueFormat:
    return DialogueFormat(
        markers=options.markers,
        roles=options.roles,
        positions=options.positions,
        order=options.order,
        max_references=options.reference_tokens,
        max_knowledge=options.knowledge_tokens,
        max_conversation=options.conversation_tokens,
    )


def _turn(turn: Mapping[str, str], actor: str) -> Turn:
    return Turn("target" if turn["author"] == actor else "other", turn["text"])


def _is_learned(turn: Mapping[str, Any], actor: str) -> bool:
    return bool(turn["author"] == actor and turn.get("weight", 1))


def _end(row: Mapping[str, Any]) -> int:
    """Behind the last turn that is learned: what comes then teaches nothing."""
    return 1 + max(i for i, turn in enumerate(row["target"]) if _is_learned(turn, row["actor"]))


def _told(row: Mapping[str, Any]) -> list[Turn]:
    """The conversation up to the last turn that is learned."""
    return [_turn(turn, row["actor"]) for turn in row["target"][: _end(row)]]


def _facts(row: Mapping[str, Any]) -> list[str]:
    return [item["text"] for item in row.get("knowledge", ())]


def _check_turns(path: str, turns: Any, check: RowCheck, *, actor: str | None = None) -> list[str] | None:
    """Authors of sound turns, each once; None where a turn is not sound. Those of `actor` may have a weight."""
    if turns is None:
        return None
    if not turns:
        check.add("E-DATA-015", path, "is empty.")
        return None
    authors: list[str | None] = []
    for i, turn in enumerate(turns):
        where = f"{path}[{i}]"
        if not isinstance(turn, dict):
            check.add("E-DATA-008", where, f"must be an object with author and text. Given: {shown(turn)}.")
            authors.append(None)
            continue
        author = check.text(f"{where}.author", row=turn)
        authors.append(author)
        check.text(f"{where}.text", row=turn)
        is_actors = actor is not None and author == actor
        check.keys(LEARNED_KEYS if is_actors else TURN_KEYS, row=turn, path=where)
        if is_actors and (turn.get("weight", 1) not in (0, 1) or isinstance(turn.get("weight"), bool)):
            check.add("E-DATA-008", f"{where}.weight", f"must be 0 or 1. Given: {shown(turn['weight'])}.")
    known = [author for author in authors if author is not None]
    return list(dict.fromkeys(known)) if len(known) == len(turns) else None
