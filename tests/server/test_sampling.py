"""The one validator: ranges, cross-field rules, messages, and the way from either protocol to the engine's form."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from trilithon.api.v1 import common_pb2, generation_pb2
from trilithon.errors import InvalidArgument
from trilithon_server.grpc.convert import generate_values
from trilithon_server.sampling import SamplingParams, to_wire, validate
from trilithon_server.sampling_rules import RULES, UNSUPPORTED
from trilithon_server.validation import MAX_VIOLATIONS, Bounds

BOUNDS = Bounds(vocab_size=49152, max_context=2048)

EXAMPLES: dict[str, Any] = {
    # name -> a value that is accepted and is not the default; float32 holds the numbers exactly
    "temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.25, "typical_p": 0.5, "top_p_decay": 0.5,
    "top_p_floor": 0.25, "top_p_reset_token_ids": [3, 4], "seed": 2**63 - 1, "n": 2, "best_of": 3,
    "beam_width": 4, "length_penalty": 0.5, "early_stopping": "first",
    "presence_penalty": -1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.25, "no_repeat_ngram": 3,
    "logit_bias": {5: -100.0, 6: 1.5}, "allowed_token_ids": [1, 2, 3], "bad_words": ["x"], "max_tokens": 9,
    "min_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [8], "include_stop_str_in_output": True,
    "ignore_eos": True, "echo": True, "return_token_ids": True, "return_offsets": True, "bypass_cache": True,
    "skip_special_tokens": False, "add_bos": False, "truncate_prompt_tokens": 11, "logprobs": 0,
    "prompt_logprobs": 5, "logprob_token_ids": [1], "after_processing": True, "stream_interval": 4,
    "constraint": {"regex": "a+"}, "priority": -3, "time_limit_ms": 50, "queue_timeout_ms": 60, "cache_salt": "s",
    "metadata": {"k": "v"},
}  # fmt: skip


def put(message: Message, path: str, value: Any) -> None:
    """Set a proto field by its path."""
    *groups, name = path.split(".")
    for group in groups:
        message = getattr(message, group)
    field = getattr(message, name)
    if isinstance(value, dict):
        field.update(value)
    elif isinstance(value, list):
        field.extend(value)
    else:
        setattr(message, name, value)


def test_every_parameter_has_an_example() -> None:
    """The table and the dataclass name the same parameters, and this file knows them all."""
    names = [rule.name for rule in RULES]

    assert names == list(EXAMPLES)
    assert names == list(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_E3_http_and_grpc_fields_mean_the_same(rule: Any) -> None:
    """One by one: a parameter set in JSON and the field that the table names in proto give the same dataclass."""
    value = EXAMPLES[rule.name]
    request = generation_pb2.GenerateRequest()
    if rule.name == "constraint":
        request.constraint.regex = "a+"
    elif rule.name == "skip_special_tokens":
        request.output.keep_special_tokens = True
    elif rule.name == "early_stopping":
        request.beam.early = common_pb2.Beam.EARLY_FIRST
    else:
        put(request, rule.proto, value)
    together = {"top_p_decay": {"top_p": 0.75}, "logprob_token_ids": {"logprobs": 1}, "best_of": {"n": 2}}
    together |= {key: {"beam_width": 2} for key in ("length_penalty", "early_stopping")}
    extra = together.get(rule.name, {})

    from_http = validate({rule.name: value, **extra}, BOUNDS)
    from_grpc = validate({**generate_values(request), **extra}, BOUNDS)

    assert from_http == from_grpc
    assert from_http != SamplingParams()


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "`temperature` must be 0 (greedy) or from 0.001 to 100. Given: -1."),
    ({"temperature": 0.0001}, "temperature", "Given: 0.0001."),
    ({"temperature": float("nan")}, "temperature", "Given"),
    ({"temperature": float("inf")}, "temperature", "Given"),
    ({"temperature": "0.5"}, "temperature", 'Given: "0.5".'),
    ({"temperature": True}, "temperature", "Given: true."),
    ({"temperature": 10**400}, "temperature", "a whole number of"),
    ({"top_p": 0}, "top_p", "`top_p` must be greater than 0 and at most 1. Given: 0."),
    ({"typical_p": 0}, "typical_p", "greater than 0"),
    ({"top_p": 5e-324}, "top_p", "greater than 0"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty", "at least 0.000001"),
    ({"top_k": -2}, "top_k", "must be 0 (off)"),
    ({"top_k": 1.5}, "top_k", "Given: 1.5"),
    ({"n": 0}, "n", "`n` must be from 1 to 16. Given: 0."),
    ({"n": 17}, "n", "from 1 to 16"),
    ({"seed": -1}, "seed", "from 0 to 9223372036854775807"),
    ({"seed": 2**63}, "seed", "9223372036854775807"),
    ({"stop": ["a", ""]}, "stop[1]", "non-empty"),
    ({"stop": "x" * 257}, "stop[0]", "256 UTF-8 bytes"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ["\ud800"]}, "stop[0]", "non-empty"),
    ({"stop_token_ids": [1, 2, 50256]}, "stop_token_ids[2]", "vocabulary size 49152"),
    ({"logit_bias": {"49152": 1}}, "logit_bias.49152", "49152"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "-100 to 100"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "1 to 16384"),
    ({"bad_words": [""]}, "bad_words[0]", "non-empty"),
    ({"metadata": {"a": 1}}, "metadata", "16 pairs"),
    ({"cache_salt": "x" * 129}, "cache_salt", "128"),
    ({"constraint": {}}, "constraint", "exactly one of"),
    ({"constraint": {"regex": "a", "choice": ["b"]}}, "constraint", "exactly one of"),
    ({"constraint": {"choice": []}}, "constraint.choice", "at least one"),
    ({"constraint": {"json_object": False}}, "constraint.json_object", "must be true"),
    ({"constraint": {"json_schema": "{"}}, "constraint.json_schema", "JSON schema"),
    ({"constraint": {"regex": "a" * 65537}}, "constraint.regex", "65536 bytes"),
    ({"best_of": 1, "n": 2}, "best_of", "from `n` (2)"),
    ({"temperature": 0, "n": 4}, "n", "Given: 4."),
    ({"temperature": 0, "typical_p": 0.9}, "typical_p", "must be 1 when `temperature` is 0"),
    ({"top_p_decay": 0.9}, "top_p_decay", "needs `top_p` below 1"),
    ({"top_p": 0.5, "top_p_floor": 0.6}, "top_p_floor", "`top_p` (0.5)"),
    ({"max_tokens": 0}, "max_tokens", "`prompt_logprobs`"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "`max_tokens` (3)"),
    ({"max_tokens": 2048}, "max_tokens", "2047"),
    ({"beam_width": 17}, "beam_width", "must be 0 (off) or from 1 to 16. Given: 17."),
    ({"beam_width": 2, "n": 3}, "n", "must be at most `beam_width` (2). Given: 3."),
    ({"beam_width": 2, "temperature": 0.7}, "temperature", "must be unset with `beam_width`. Given: 0.7."),
    ({"beam_width": 2, "temperature": 0}, "temperature", "must be unset with `beam_width`"),
    ({"beam_width": 2, "seed": 1}, "seed", "must be unset with `beam_width`"),
    ({"beam_width": 2, "best_of": 2}, "best_of", "must be unset with `beam_width`"),
    ({"beam_width": 2, "max_tokens": 0, "prompt_logprobs": 0}, "beam_width", "needs `max_tokens` of at least 1"),
    ({"length_penalty": 1.0}, "length_penalty", "needs `beam_width`"),
    ({"length_penalty": 11, "beam_width": 2}, "length_penalty", "from -10 to 10"),
    ({"early_stopping": "first"}, "early_stopping", "needs `beam_width`"),
    ({"early_stopping": "soon", "beam_width": 2}, "early_stopping", "one of heuristic, first, never"),
    ({"speculation": True}, "speculation", "not supported"),
    ({"priority": 11}, "priority", "from -10 to 10 for this key"),
]


@pytest.mark.parametrize(("values", "field", "part"), BROKEN, ids=lambda v: str(v)[:40])
def test_R11_a_broken_rule_is_told_in_one_sentence(values: dict[str, Any], field: str, part: str) -> None:
    """Where, what rule, what was given: for every kind of rule, with the machine form beside it."""
    with pytest.raises(InvalidArgument) as caught:
        validate(values, BOUNDS)

    (violation,) = caught.value.details
    assert violation.field == field
    assert part in violation.message
    assert str(caught.value) == violation.message


def test_all_violations_come_together_in_field_order() -> None:
    """Nothing is reported one at a time, and never more than 16."""
    bad: dict[str, Any] = {rule.name: object() for rule in reversed(RULES)}

    with pytest.raises(InvalidArgument) as caught:
        validate(bad, BOUNDS)

    fields = [violation.field for violation in caught.value.details]
    assert fields == [rule.name for rule in RULES][:MAX_VIOLATIONS]


def test_S7_values_are_cut_and_escaped() -> None:
    """What a user sends appears in messages cut to 64 characters, with control characters escaped."""
    with pytest.raises(InvalidArgument) as caught:
        validate({"seed": "\x1b[31m\n" + "x" * 200}, BOUNDS)

    message = caught.value.message
    assert message.isprintable()
    assert "x" * 65 not in message
    assert "\\u001b[31m\\n" in message


def test_unset_and_zero() -> None:
    """Null is unset; zero means what the table says, and switching a feature off is no error."""
    params = validate({"temperature": None, "top_k": -1, "logprobs": 0, "seed": "12", "beam_width": 0}, BOUNDS)

    assert (params.temperature, params.top_k, params.logprobs, params.seed) == (1.0, 0, 0, 12)
    assert validate({"speculation": False}, BOUNDS) == SamplingParams()


def test_streams_cannot_rank() -> None:
    """`best_of` above `n` needs all answers before the first can be sent."""
    with pytest.raises(InvalidArgument, match="must equal `n` when streaming"):
        validate({"best_of": 2}, BOUNDS, stream=True)

    assert validate({"best_of": 2}, BOUNDS).num_sequences == 2


def test_to_wire_resolves_everything() -> None:
    """Unset becomes the engine's "off", and ranking asks for log-probabilities."""
    plain = to_wire(SamplingParams(), seed=1, max_tokens=5, end_token_ids=(2,), reset_token_ids=(9,))
    ranked = to_wire(SamplingParams(best_of=2), seed=1, max_tokens=5, end_token_ids=(2,), reset_token_ids=())
    decaying = to_wire(
        SamplingParams(top_p=0.9, top_p_decay=0.5, ignore_eos=True),
        seed=1, max_tokens=5, end_token_ids=(2,), reset_token_ids=(9,),
    )  # fmt: skip

    assert (plain.num_sequences, plain.top_p_decay, plain.logprobs, list(plain.end_token_ids)) == (1, 1.0, -1, [2])
    assert list(plain.top_p_reset_token_ids) == []
    assert (ranked.num_sequences, ranked.logprobs) == (2, 0)
    assert list(decaying.top_p_reset_token_ids) == [9]
    assert list(decaying.end_token_ids) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(values=st.dictionaries(st.sampled_from([*EXAMPLES, *UNSUPPORTED]), JSON, max_size=6))
def test_S9_any_values_are_accepted_or_refused(values: dict[str, Any]) -> None:
    """No value makes the validator fail in another way than by its own error; what it accepts, it accepts again."""
    try:
        params = validate(values, BOUNDS)
    except InvalidArgument:
        return
    assert validate(params.given(), BOUNDS) == params
