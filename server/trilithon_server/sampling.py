"""
The parameters of a request: one frozen dataclass and one validator for both protocols.

HTTP bodies and protobuf messages are both brought to a mapping of JSON names and go through `validate`, which follows
the table in `sampling_rules.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trilithon_server.constraint_rules import Constraint
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.sampling_rules import RULES, UNSUPPORTED
from trilithon_server.validation import Bounds, Broken, Violations, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """
    How to generate. Every default means "off" or "the server decides"; names and ranges are those of the JSON API.

    >>> SamplingParams(temperature=0.0, max_tokens=16).given()
    {'temperature': 0.0, 'max_tokens': 16}

    Build one by hand for in-process use and pass it through `validate(params.given(), bounds)` before it is used.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_p_decay: float | None = None
    top_p_floor: float = 0.0
    top_p_reset_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    beam_width: int = 0
    length_penalty: float | None = None
    early_stopping: str | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    echo: bool = False
    return_token_ids: bool = False
    return_offsets: bool = False
    bypass_cache: bool = False
    skip_special_tokens: bool = True
    add_bos: bool | None = None
    truncate_prompt_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    after_processing: bool = False
    stream_interval: int = 1
    constraint: Constraint | None = None
    priority: int = 0
    time_limit_ms: int = 0
    queue_timeout_ms: int = 0
    cache_salt: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, in the form that `validate` takes."""
        out = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if callable(item.default_factory) else item.default
            if value != default:
                out[item.name] = value
        if self.constraint is not None:
            kind = self.constraint.kind
            out["constraint"] = {kind: list(self.constraint.choices) if kind == "choice" else self.constraint.source}
        return out

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine computes at once: the beams, `best_of`, or `n`."""
        return self.beam_width or self.best_of or self.n

    @property
    def num_told(self) -> int:
        """Sequences that the engine tells of: all of them, or the best beams."""
        return self.n if self.beam_width else self.num_sequences


def validate(
    values: Mapping[str, Any], bounds: Bounds, found: Violations | None = None, *, stream: bool = False
) -> SamplingParams:
    """
    Check the parameters of one request; `None` means unset.

    >>> validate({"temperature": 0, "max_tokens": 3}, Bounds()).max_tokens
    3

    Args:
        values: JSON name -> value as parsed; names outside the table are the caller's business.
        bounds: the limits of the server, the model and the key.
        found: where violations go; the caller raises. Without it they are raised here.
        stream: whether the answer is streamed.
    Returns:
        The parameters; meaningless when `found` has gained violations.
    Raises:
        InvalidArgument: every broken rule, in the order of the table (only without `found`).
    """
    mine = Violations() if found is None else found
    before = bool(mine)
    accepted: dict[str, Any] = {}
    for rule in RULES:
        value = values.get(rule.name)
        if value is None:
            continue
        try:
            accepted[rule.name] = rule.check(value, bounds)
        except Broken as broken:
            text = broken.rule or rule.text.format_map(_Fields(bounds))
            given = value if broken.given is ... else broken.given
            mine.add(rule.name + broken.at, text, given=given, code=broken.code or "invalid_value")
    for name in UNSUPPORTED:
        _refuse_unsupported(name, values.get(name), bounds, mine)
    if accepted.get("top_k") == -1:
        accepted["top_k"] = 0
    params = SamplingParams(**accepted)
    if not mine or (before and found is not None):
        cross_check(params, mine, stream=stream)
    if found is None:
        mine.raise_if_any()
    return params


class _Fields(dict[str, Any]):
    """Lets a rule's text name any attribute of `Bounds`, `max_output` included."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, key: str) -> Any:
        return getattr(self._bounds, key)


def _refuse_unsupported(name: str, value: object, bounds: Bounds, found: Violations) -> None:
    if value is None or (name == "speculation" and value is False):
        return
    try:
        UNSUPPORTED[name][1](value, bounds)
    except Broken:
        message = f"`{name}` is not supported by this server. Given: {shown(value)}. Remove it."
        found.say(name, message, code="unsupported_parameter", rule="is not supported", given=shown(value))


def cross_check(params: SamplingParams, found: Violations, *, stream: bool) -> None:
    """The rules that concern more than one parameter."""
    p = params
    if p.best_of is not None and p.best_of < p.n:
        found.add("best_of", f"must be from `n` ({p.n}) up", given=p.best_of)
    if p.beam_width:
        _check_beam(p, found)
    else:
        for name in ("length_penalty", "early_stopping"):
            if getattr(p, name) is not None:
                found.add(name, "needs `beam_width`", given=getattr(p, name))
    if p.temperature == 0 and not p.beam_width and p.num_sequences > 1:
        name = "n" if p.n > 1 else "best_of"
        message = f"`{name}` must be 1 when `temperature` is 0 (all answers would be equal). Given: {p.num_sequences}."
        found.say(name, message, code="greedy_n", rule="must be 1 when `temperature` is 0", given=str(p.num_sequences))
    if p.temperature == 0 and p.typical_p != 1:
        found.add("typical_p", "must be 1 when `temperature` is 0", given=_short(p.typical_p), code="greedy_typical")
    if stream and p.best_of is not None and p.best_of > p.n:
        message = f"`best_of` must equal `n` when streaming. Given: `n` {p.n}, `best_of` {p.best_of}."
        found.say("best_of", message, code="best_of_stream", rule="must equal `n` when streaming", given=str(p.best_of))
    if p.top_p_decay is not None and p.top_p_decay < 1 and p.top_p >= 1:
        message = "`top_p_decay` needs `top_p` below 1. Given: 1."
        found.say("top_p_decay", message, code="decay_needs_top_p", rule="needs `top_p` below 1", given="1")
    if p.top_p_floor > p.top_p:
        found.add("top_p_floor", f"must be from 0 to `top_p` ({p.top_p:g})", given=_short(p.top_p_floor))
    if p.max_tokens == 0 and p.prompt_logprobs is None:
        found.add("max_tokens", "must be at least 1; 0 only together with `prompt_logprobs`", given=0)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        found.add("min_tokens", f"must be from 0 to `max_tokens` ({p.max_tokens})", given=p.min_tokens)
    if p.logprob_token_ids and p.logprobs is None and p.prompt_logprobs is None:
        found.add("logprob_token_ids", "needs `logprobs` or `prompt_logprobs`", given=list(p.logprob_token_ids))


def _short(value: Any) -> Any:
    """A number as it was written: the table keeps floats at the precision of the wire, which has longer digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _check_beam(p: SamplingParams, found: Violations) -> None:
    """A beam search draws nothing, and has no more answers than beams."""
    off = SamplingParams()
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_p_decay", "seed", "best_of")
    given = [name for name in names if getattr(p, name) != getattr(off, name)]
    for name in given:
        rule = "must be unset with `beam_width`"
        found.add(name, rule, given=_short(getattr(p, name)), code="beam_sampling")
    if p.n > p.beam_width:
        found.add("n", f"must be at most `beam_width` ({p.beam_width})", given=p.n, code="beam_n")
    if p.max_tokens == 0:
        found.add("beam_width", "needs `max_tokens` of at least 1", given=p.beam_width)


_EARLY = {"heuristic": wire.Beam.HEURISTIC, "first": wire.Beam.FIRST, "never": wire.Beam.NEVER}


def to_wire(
    params: SamplingParams,
    *,
    seed: int,
    max_tokens: int,
    end_token_ids: tuple[int, ...],
    reset_token_ids: tuple[int, ...],
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> wire.Sampling:
    """
    The engine's form, with everything resolved.

    Args:
        params: as `validate` returned them.
        seed: the caller's, or drawn.
        max_tokens: after the room in the window is known.
        end_token_ids: the model's; left out here when `ignore_eos`.
        reset_token_ids: the model's default for factual-nucleus sampling.
        bad_words: token sequences, with and without a leading space.
    """
    p = params
    reset = reset_token_ids if p.top_p_reset_token_ids is None else p.top_p_reset_token_ids
    decays = p.top_p_decay is not None and p.top_p_decay < 1
    logprobs = -1 if p.logprobs is None else p.logprobs
    if p.num_sequences > p.n or p.beam_width:
        logprobs = max(logprobs, 0)  # the ranking of best_of needs the chosen tokens' log-probabilities
    beam = None
    if p.beam_width:
        penalty = 1.0 if p.length_penalty is None else p.length_penalty
        beam = wire.Beam(num_answers=p.n, length_penalty=penalty, early=_EARLY[p.early_stopping or "heuristic"])
    return wire.Sampling(
        num_sequences=p.num_sequences,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        typical_p=p.typical_p,
        top_p_decay=p.top_p_decay if decays and p.top_p_decay is not None else 1.0,
        top_p_floor=p.top_p_floor,
        top_p_reset_token_ids=reset if decays else (),
        seed=seed,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        repetition_penalty=p.repetition_penalty,
        no_repeat_ngram=p.no_repeat_ngram,
        logit_bias=p.logit_bias,
        allowed_token_ids=p.allowed_token_ids or (),
        bad_words=[wire.TokenSequence(ids=ids) for ids in bad_words],
        max_tokens=max_tokens,
        min_tokens=p.min_tokens,
        end_token_ids=() if p.ignore_eos else end_token_ids,
        stop_token_ids=p.stop_token_ids,
        logprobs=logprobs,
        prompt_logprobs=-1 if p.prompt_logprobs is None else p.prompt_logprobs,
        logprob_token_ids=p.logprob_token_ids,
        logprobs_after_processing=p.after_processing,
        constraint=None if p.constraint is None else p.constraint.to_wire(),
        beam=beam,
    )
