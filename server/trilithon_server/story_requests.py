"""What is asked of a story, what is kept of it, and what is wrong with a request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trilithon.errors import FailedPrecondition, NotFound
from trilithon_server.assembly import FinishReason
from trilithon_server.config import LimitsConfig
from trilithon_server.knowledge.concepts import Concepts
from trilithon_server.knowledge.fact_vectors import ScoredFact
from trilithon_server.sampling_rules import RULES
from trilithon_server.validation import Violations, is_text, nearest, shown

Mode = Literal["replace", "append", "antonym"]
MODES: tuple[str, ...] = get_args(Mode)

STORY_KEPT_S = 24 * 3600.0
MAX_STORIES = 256
"""Kept of one tenant."""
MAX_SENTENCES = 32
MAX_KNOWLEDGE = 50
MAX_CONTROL_KEYWORDS = 8
MAX_KEYWORD_CHARS = 64
DEFAULT_SENTENCES = 4
DEFAULT_KNOWLEDGE = 3
"""Where a server knows concepts and serves an encoder; else none."""
DEFAULT_TOKENS = 64
"""Of a sentence."""
DRAWING: Mapping[str, Any] = {"temperature": 0.7, "top_k": 40}
"""Where a request says nothing of how to draw (arXiv 2010.00840 has top-k 40)."""
_FIXED: tuple[tuple[str, int | bool, str], ...] = (
    ("n", 1, "a story goes on from each of its sentences"),
    ("best_of", 1, "a story goes on from each of its sentences"),
    ("min_tokens", 0, "a sentence ends where it ends"),
    ("ignore_eos", False, "a sentence ends where it ends"),
)
"""Parameters that mean nothing here, with the value that says so."""
_DRAWN_BY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_p_decay", "top_p_floor")

META = tuple(rule.name for rule in RULES if rule.proto.startswith("meta."))
"""Parameters of the request itself: a story does not keep them, and a rewrite takes no others."""
REWRITE_HIDDEN = tuple(rule.name for rule in RULES if rule.name not in META)
"""The others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """
    What a sentence is to be about.

    Attributes:
        index: of the sentence, from 2: the first one is given.
        keywords: `replace`: in the place of predicted ones. `append`: before them. `antonym`: the opposites of these,
            or of those that it would have had where none are given.
        mode: one of `MODES`.
    """

    index: int
    keywords: Sequence[str] = ()
    mode: str = "replace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """
    A request.

    Attributes:
        sentences: to be written, beside the first; 0: four.
        kb: name of the server's concepts; empty: whatever it has.
        knowledge_k: facts for each sentence, at most; None: three where there is knowledge.
        keyword_model, ranker: names of models; empty: see `story_models.cast`.
    """

    first_sentence: str
    sentences: int = 0
    controls: Sequence[Control] = ()
    kb: str = ""
    knowledge_k: int | None = None
    keyword_model: str = ""
    ranker: str = ""

    @property
    def length(self) -> int:
        """Sentences of the whole story."""
        return 1 + (self.sentences or DEFAULT_SENTENCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """
    One sentence and what it was written from.

    Attributes:
        index: from 1.
        keywords: that it is about.
        facts: that the prompt held.
        unknown: keywords of which the concepts know nothing.
        unopposed: keywords that were to become their opposite and have none.
        logprob: of the text's tokens, summed; 0.0 for the first sentence, which was given.
        finish: why it ended; None for the first one.
    """

    index: int
    text: str
    keywords: tuple[str, ...] = ()
    facts: tuple[ScoredFact, ...] = ()
    unknown: tuple[str, ...] = ()
    unopposed: tuple[str, ...] = ()
    logprob: float = 0.0
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """
    A story as far as it is written, and all that writes it again.

    Attributes:
        model: that writes it.
        controls: by index; `asked` has those of the first request.
        values: sampling parameters by JSON name.
        knowledge_k: resolved.
    """

    id: str
    model: str
    seed: int
    asked: Asked
    values: Mapping[str, Any]
    knowledge_k: int
    controls: Mapping[int, Control] = field(default_factory=dict)
    sentences: tuple[Sentence, ...] = ()

    @property
    def text(self) -> str:
        """All sentences in one line."""
        return " ".join(sentence.text for sentence in self.sentences)


def drawing(values: Mapping[str, Any]) -> dict[str, Any]:
    """How a story's sentences are drawn, with the defaults of stories; null is unset."""
    own = {name: value for name, value in values.items() if name not in META and value is not None}
    return own if any(name in own for name in _DRAWN_BY) else {**DRAWING, **own}


def knowledge_of(asked: Asked, concepts: Concepts | None, *, has_encoder: bool) -> int:
    """
    How many facts a sentence may have.

    Raises:
        FailedPrecondition: knowledge is asked for, and the server has no concepts, or no encoder to rank facts with.
        NotFound: `knowledge_not_found`, its concepts have another name.
    """
    wanted = asked.knowledge_k
    if concepts is None:
        if wanted or asked.kb:
            raise FailedPrecondition(
                "this server knows no concepts, so a story can have no knowledge.",
                code="concepts_missing",
                hint="Set server.concepts to a file or folder of facts, or ask with knowledge_k 0.",
            )
        return 0
    if asked.kb not in ("", concepts.name):
        message = f"no concepts are named {shown(asked.kb)}. Known here: `{concepts.name}`."
        raise NotFound(message, code="knowledge_not_found", hint="Leave kb out.")
    if not has_encoder:
        if wanted:
            raise FailedPrecondition(
                "facts are ranked by the vectors of an encoder, and none is served.",
                code="unsupported_model",
                hint="Serve one beside the model, or ask with knowledge_k 0.",
            )
        return 0
    return DEFAULT_KNOWLEDGE if wanted is None else wanted


def check(
    asked: Asked,
    values: Mapping[str, Any],
    found: Violations,
    *,
    concepts: Concepts | None,
    limits: LimitsConfig,
) -> None:
    """Everything that is wrong with a request, whatever the models."""
    if not asked.first_sentence.strip():
        found.add("first_sentence", "must not be empty", given=asked.first_sentence, code="empty_prompt")
    else:
        _check_text("first_sentence", asked.first_sentence, limits.max_message_bytes, found)
    if not 0 <= asked.sentences <= MAX_SENTENCES:
        found.add("sentences", f"must be from 1 to {MAX_SENTENCES}", given=asked.sentences)
    if asked.knowledge_k is not None and not 0 <= asked.knowledge_k <= MAX_KNOWLEDGE:
        found.add("knowledge_k", f"must be from 0 to {MAX_KNOWLEDGE}", given=asked.knowledge_k)
    for name, only, reason in _FIXED:
        if values.get(name) not in (None, only):
            found.add(name, f"must be {json.dumps(only)}: {reason}", given=values[name])
    if len(asked.controls) > MAX_SENTENCES:
        found.add("controls", f"must hold at most {MAX_SENTENCES} controls", given=len(asked.controls))
    seen: set[int] = set()
    for i, control in enumerate(asked.controls[:MAX_SENTENCES]):
        check_control(f"controls[{i}]", control, found, last=asked.length, concepts=concepts)
        if control.index in seen:
            rule = "must be given once: two controls of one sentence contradict each other"
            found.add(f"controls[{i}].index", rule, given=control.index)
        seen.add(control.index)


def check_control(name: str, control: Control, found: Violations, *, last: int, concepts: Concepts | None) -> None:
    """What is wrong with one control of a story whose sentences 2 to `last` may be controlled."""
    if not 2 <= control.index <= last:
        found.add(f"{name}.index", f"must be from 2 to {last}: sentence 1 is given", given=control.index)
    if control.mode not in MODES:
        todo = nearest(control.mode, MODES).strip()
        found.add(f"{name}.mode", f"must be one of {', '.join(MODES)}", given=control.mode, todo=todo)
    elif control.mode == "antonym":
        if concepts is None:
            todo = "Set server.concepts to a folder of facts with antonyms, or give the keywords yourself."
            found.add(f"{name}.mode", "must not be antonym where the server knows no concepts", todo=todo)
    elif not control.keywords:
        found.add(f"{name}.keywords", f"must not be empty with mode {control.mode}", code="missing_parameter")
    if len(control.keywords) > MAX_CONTROL_KEYWORDS:
        rule = f"must hold at most {MAX_CONTROL_KEYWORDS} keywords"
        found.add(f"{name}.keywords", rule, given=len(control.keywords))
    for i, keyword in enumerate(control.keywords[:MAX_CONTROL_KEYWORDS]):
        where = f"{name}.keywords[{i}]"
        if not keyword.strip() or "," in keyword or len(keyword) > MAX_KEYWORD_CHARS or not keyword.isprintable():
            rule = f"must be a word or a phrase of at most {MAX_KEYWORD_CHARS} printable characters, without commas"
            found.add(where, rule, given=keyword)
        else:
            _check_text(where, keyword, MAX_KEYWORD_CHARS * 4, found)


def _check_text(name: str, text: str, most: int, found: Violations) -> None:
    if not is_text(text):
        found.add(name, "must be sound Unicode (it holds half of a surrogate pair)")
    elif (size := len(text.encode())) > most:
        found.add(name, f"must have at most {most} bytes", given=f"{size} bytes")
