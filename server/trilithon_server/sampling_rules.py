"""
The table of request parameters: JSON name, proto field, what is accepted, how the rule reads, its JSON schema.

The validator in `sampling.py`, the OpenAPI document and the reference page are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trilithon_server.constraint_rules import parse_constraint
from trilithon_server.validation import (
    Check,
    bias,
    boolean,
    number,
    one_of,
    pairs,
    string,
    strings,
    token_ids,
    whole,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table: what a parameter accepts and what is said when it is broken (`{...}` are `Bounds`)."""

    name: str
    proto: str  # path of the field inside GenerateRequest
    check: Check
    text: str
    schema: Mapping[str, Any]
    meaning: str


_BOOL = {"type": "boolean"}
_TRUE_FALSE = "must be true or false"
_UNIT = "must be greater than 0 and at most 1"
_UNIT_SCHEMA = {"type": "number", "minimum": 1e-30, "maximum": 1}  # a float cannot tell much less from 0
_IDS = {"type": "integer", "minimum": 0}


def _flag(name: str, proto: str, meaning: str) -> Rule:
    return Rule(name=name, proto=proto, check=boolean, text=_TRUE_FALSE, schema=_BOOL, meaning=meaning)


def _range(low: float, high: float, kind: str = "number") -> dict[str, Any]:
    return {"type": kind, "minimum": low, "maximum": high}


def _id_list(most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": _IDS, "minItems": least, "maxItems": most}


RULES: tuple[Rule, ...] = (
    Rule(
        name="temperature",
        proto="sampling.temperature",
        check=number(0.001, 100, zero=True),
        text="must be 0 (greedy) or from 0.001 to 100",
        schema={"anyOf": [{"const": 0}, _range(0.001, 100)]},
        meaning="Divides the logits; 0 picks the most likely token. Default 1.",
    ),
    Rule(
        name="top_k",
        proto="sampling.top_k",
        check=whole(0, 1_000_000, also=(-1,)),
        text="must be 0 (off) or a whole number up to 1000000",
        schema=_range(-1, 1_000_000, "integer"),
        meaning="Draw from the k most likely tokens; 0 or -1 is off (default).",
    ),
    Rule(
        name="top_p",
        proto="sampling.top_p",
        check=number(0, 1, above=True),
        text=_UNIT,
        schema=_UNIT_SCHEMA,
        meaning="Draw from the smallest set of tokens with this much probability. Default 1 (off).",
    ),
    Rule(
        name="min_p",
        proto="sampling.min_p",
        check=number(0, 1),
        text="must be from 0 to 1",
        schema=_range(0, 1),
        meaning="Drop tokens below this share of the most likely one's probability. Default 0 (off).",
    ),
    Rule(
        name="typical_p",
        proto="sampling.typical_p",
        check=number(0, 1, above=True),
        text=_UNIT,
        schema=_UNIT_SCHEMA,
        meaning="Locally typical sampling. Default 1 (off).",
    ),
    Rule(
        name="top_p_decay",
        proto="sampling.factual.decay",
        check=number(0, 1, above=True),
        text=_UNIT,
        schema=_UNIT_SCHEMA,
        meaning="Factual-nucleus sampling: top_p shrinks by this factor per token since the last reset. Default off.",
    ),
    Rule(
        name="top_p_floor",
        proto="sampling.factual.floor",
        check=number(0, 1),
        text="must be from 0 to `top_p`",
        schema=_range(0, 1),
        meaning="The least that top_p shrinks to, from 0 to top_p. Default 0.",
    ),
    Rule(
        name="top_p_reset_token_ids",
        proto="sampling.factual.reset_token_ids",
        check=token_ids(256),
        text="must hold at most 256 token ids, each below the vocabulary size {vocab_size}",
        schema=_id_list(256),
        meaning="Tokens that bring top_p back; default: those whose text ends in . ! ? or a newline; [] never.",
    ),
    Rule(
        name="seed",
        proto="sampling.seed",
        check=whole(0, (1 << 63) - 1, digits=True),
        text="must be a whole number from 0 to 9223372036854775807",
        schema={"anyOf": [_range(0, (1 << 63) - 1, "integer"), {"type": "string", "pattern": "^[0-9]{1,18}$"}]},
        meaning="Repeats a sample whatever the load and the layout; drawn by the server and returned when unset.",
    ),
    Rule(
        name="n",
        proto="sampling.n",
        check=whole(1, "max_n"),
        text="must be from 1 to {max_n}",
        schema=_range(1, 16, "integer"),
        meaning="How many answers. Default 1.",
    ),
    Rule(
        name="best_of",
        proto="sampling.best_of",
        check=whole(1, "max_n"),
        text="must be from `n` to {max_n}",
        schema=_range(1, 16, "integer"),
        meaning="Generate this many and return the `n` with the highest log-probability. Default n.",
    ),
    Rule(
        name="beam_width",
        proto="beam.width",
        check=whole(0, "max_beam"),
        text="must be 0 (off) or from 1 to {max_beam}",
        schema=_range(0, 16, "integer"),
        meaning="Search with this many beams instead of drawing; the best `n` are told, at the end. Default 0 (off).",
    ),
    Rule(
        name="length_penalty",
        proto="beam.length_penalty",
        check=number(-10, 10),
        text="must be from -10 to 10",
        schema=_range(-10, 10),
        meaning="An answer of a beam search is worth its log-probability / length^this. Default 1.",
    ),
    Rule(
        name="early_stopping",
        proto="beam.early",
        check=one_of("heuristic", "first", "never"),
        text="must be one of heuristic, first, never",
        schema={"enum": ["heuristic", "first", "never"]},
        meaning="With all beams ended: stop when no open one looks better now, at once, or when none can get better.",
    ),
    Rule(
        name="presence_penalty",
        proto="penalties.presence",
        check=number(-2, 2),
        text="must be from -2 to 2",
        schema=_range(-2, 2),
        meaning="Subtracted once from the logit of every token generated before. Default 0.",
    ),
    Rule(
        name="frequency_penalty",
        proto="penalties.frequency",
        check=number(-2, 2),
        text="must be from -2 to 2",
        schema=_range(-2, 2),
        meaning="Subtracted for each time a token was generated before. Default 0.",
    ),
    Rule(
        name="repetition_penalty",
        proto="penalties.repetition",
        check=number(1e-6, 10),
        text="must be greater than 0 (at least 0.000001) and at most 10",
        schema=_range(1e-6, 10),
        meaning="Divides (below zero: multiplies) logits of tokens of the prompt and the answer. Default 1 (off).",
    ),
    Rule(
        name="no_repeat_ngram",
        proto="penalties.no_repeat_ngram",
        check=whole(0, 32),
        text="must be from 0 (off) to 32",
        schema=_range(0, 32, "integer"),
        meaning="No sequence of this many tokens comes twice. Default 0 (off).",
    ),
    Rule(
        name="logit_bias",
        proto="penalties.logit_bias",
        check=bias("max_logit_bias", low=-100, high=100),
        text="must map at most {max_logit_bias} token ids below {vocab_size} to values from -100 to 100 (-100 bans)",
        schema={
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "maxProperties": 1024,
            "additionalProperties": _range(-100, 100),
        },
        meaning="Added to logits, by token id; -100 bans a token.",
    ),
    Rule(
        name="allowed_token_ids",
        proto="penalties.allowed_token_ids",
        check=token_ids("max_allowed_ids", least=1),
        text="must hold 1 to {max_allowed_ids} token ids, each below {vocab_size}",
        schema=_id_list(16_384, 1),
        meaning="Only these tokens may be drawn. Default all.",
    ),
    Rule(
        name="bad_words",
        proto="penalties.bad_words",
        check=strings("max_bad_words", max_bytes=1024),
        text="must be at most {max_bad_words} non-empty strings of at most {max_bad_word_tokens} tokens each",
        schema={"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 256},
        meaning="Texts that must not appear, with or without a leading space.",
    ),
    Rule(
        name="max_tokens",
        proto="stopping.max_tokens",
        check=whole(0, "max_output"),
        text="must be from 1 to {max_output}; 0 only together with `prompt_logprobs`",
        schema={"type": "integer", "minimum": 0},
        meaning="Tokens to generate at most. Default: the room left, at most 1024; 16 on /v1/completions.",
    ),
    Rule(
        name="min_tokens",
        proto="stopping.min_tokens",
        check=whole(0, "max_output"),
        text="must be from 0 to `max_tokens`",
        schema={"type": "integer", "minimum": 0},
        meaning="End tokens are masked and stop strings not looked for until then. Default 0.",
    ),
    Rule(
        name="stop",
        proto="stopping.stop",
        check=strings("max_stop", max_bytes="max_stop_bytes", single=True),
        text="must be at most {max_stop} non-empty strings of at most {max_stop_bytes} UTF-8 bytes",
        schema={
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 64},
                {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 64}, "maxItems": 16},
            ]
        },
        meaning="Texts that end the answer.",
    ),
    Rule(
        name="stop_token_ids",
        proto="stopping.stop_token_ids",
        check=token_ids("max_stop_token_ids"),
        text="must hold at most {max_stop_token_ids} token ids, each below {vocab_size}",
        schema=_id_list(64),
        meaning="Tokens that end the answer, besides the model's own end tokens.",
    ),
    _flag("include_stop_str_in_output", "stopping.include_stop", "Keep the stop string in the text. Default false."),
    _flag("ignore_eos", "stopping.ignore_eos", "Generate past the model's end tokens. Default false."),
    _flag("echo", "output.echo", "Put the prompt before the answer's text. Default false."),
    _flag("return_token_ids", "output.token_ids", "Return token ids. Default false."),
    _flag("return_offsets", "output.offsets", "Return where each token's text starts. Default false."),
    _flag("bypass_cache", "meta.bypass_cache", "Neither read nor write the prefix cache. Default false."),
    _flag("skip_special_tokens", "output.keep_special_tokens", "Leave special tokens out of the text. Default true."),
    _flag("add_bos", "prompt.add_bos", "Put the begin token before a text prompt. Default: the tokenizer's habit."),
    Rule(
        name="truncate_prompt_tokens",
        proto="prompt.truncate_tokens",
        check=whole(0, "max_prompt"),
        text="must be from 0 (do not truncate) to {max_prompt}",
        schema={"type": "integer", "minimum": 0},
        meaning="Keep only this many tokens of the prompt, the last ones. Default 0 (never).",
    ),
    Rule(
        name="logprobs",
        proto="output.logprobs",
        check=whole(0, "max_logprobs"),
        text="must be from 0 to {max_logprobs}",
        schema=_range(0, 20, "integer"),
        meaning="Log-probabilities of the chosen token and of this many most likely ones.",
    ),
    Rule(
        name="prompt_logprobs",
        proto="output.prompt_logprobs",
        check=whole(0, "max_logprobs"),
        text="must be from 0 to {max_logprobs}",
        schema=_range(0, 20, "integer"),
        meaning="The same for the prompt's tokens, from the second on.",
    ),
    Rule(
        name="logprob_token_ids",
        proto="output.logprob_token_ids",
        check=token_ids("max_logprob_token_ids"),
        text="must hold at most {max_logprob_token_ids} token ids, each below {vocab_size}",
        schema=_id_list(64),
        meaning="Report these tokens' log-probabilities at every position too.",
    ),
    _flag(
        "after_processing",
        "output.after_processing",
        "Log-probabilities after penalties, masks and temperature instead of the model's own. Default false.",
    ),
    Rule(
        name="stream_interval",
        proto="output.stream_interval",
        check=whole(1, 64),
        text="must be from 1 to 64 (tokens per event)",
        schema=_range(1, 64, "integer"),
        meaning="Tokens per event of a stream. Default 1.",
    ),
    Rule(
        name="constraint",
        proto="constraint",
        check=parse_constraint,
        text="must set exactly one of json_schema, json_object, regex, grammar, choice",
        schema={"$ref": "#/components/schemas/Constraint"},
        meaning="The form that the answer must take.",
    ),
    Rule(
        name="priority",
        proto="meta.priority",
        check=whole(-10, "max_priority"),
        text="must be from -10 to {max_priority} for this key",
        schema=_range(-10, 10, "integer"),
        meaning="Larger goes first. Default 0.",
    ),
    Rule(
        name="time_limit_ms",
        proto="meta.time_limit_ms",
        check=whole(0, "max_time_ms"),
        text="must be from 1 to {max_time_ms}, or 0 for the server's own limit",
        schema={"type": "integer", "minimum": 0},
        meaning="Generation ends this long after arrival with what it has. Default 0 (the server's limit).",
    ),
    Rule(
        name="queue_timeout_ms",
        proto="meta.queue_timeout_ms",
        check=whole(0, 600_000),
        text="must be from 1 to 600000, or 0 for the default",
        schema=_range(0, 600_000, "integer"),
        meaning="How long the request may wait in the queue. Default 60000.",
    ),
    Rule(
        name="cache_salt",
        proto="meta.cache_salt",
        check=string(128),
        text="must be at most 128 UTF-8 bytes",
        schema={"type": "string", "maxLength": 32},
        meaning="Requests with different salts never share cached prefixes.",
    ),
    Rule(
        name="metadata",
        proto="meta.metadata",
        check=pairs(16, key_chars=64, value_chars=512),
        text="must be at most 16 pairs; keys up to 64, values up to 512 characters",
        schema={
            "type": "object",
            "maxProperties": 16,
            "propertyNames": {"maxLength": 64},
            "additionalProperties": {"type": "string", "maxLength": 512},
        },
        meaning="Labels of the caller's own; not used by the server.",
    ),
)

BY_NAME: Mapping[str, Rule] = {rule.name: rule for rule in RULES}

UNSUPPORTED: Mapping[str, tuple[str, Check, Mapping[str, Any]]] = {
    # name -> (proto field, what turns it off and is therefore accepted, its JSON schema)
    "speculation": ("no_speculation", one_of(), {"const": False}),
}
"""Parameters of the contract that this version lacks: refused by name unless set to what it does anyway."""

NAMES: tuple[str, ...] = (*BY_NAME, *UNSUPPORTED)
"""Every parameter name, in the order in which violations are reported."""

META_NAMES = tuple(rule.name for rule in RULES if rule.proto.startswith("meta."))
"""Parameters of every call, whatever it does."""

TASK_RULES = tuple(rule for rule in RULES if rule.proto.startswith(("meta.", "sampling.", "stopping.")))
"""Parameters of calls that write their prompt themselves and read the answer's text alone."""

TASK_HIDDEN = tuple(rule.name for rule in RULES if rule not in TASK_RULES)
"""The others."""
