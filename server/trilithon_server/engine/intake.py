"""
The engine's own check of a request: the front has validated it, but a bad message must not hurt the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trilithon_server.engine.encoder_scheduler import MAX_OUTPUT_BYTES
from trilithon_server.engine.request import Request, Sequence
from trilithon_server.engine.wire_pb2 import Beam, Sampling, Submit

MAX_SEQUENCES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the loaded model and its cache allow."""

    model_digest: str
    vocab_size: int
    max_context: int
    is_encoder: bool
    is_seq2seq: bool = False
    token_types: int = 0
    task_columns: int = 0  # of the logits of the task head; 0: there is none
    task_rows: int = 0  # of a sequence's logits; 0: one a token
    num_blocks: int = 0
    block_size: int = 16
    max_queued_requests: int = 1024
    max_adapters: int = 0


class Refusal(Exception):
    """A request that can't be run: `code` as in the wire's Error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check(submit: Submit, facts: Facts) -> None:
    """Raise Refusal for what this engine can never run."""
    length = len(submit.prompt)
    if not length:
        raise Refusal("empty_prompt", "the prompt must not be empty. Given: 0 tokens.")
    if max(submit.prompt) >= facts.vocab_size:
        raise Refusal("token_id_range", f"prompt ids must be below {facts.vocab_size}. Given: {max(submit.prompt)}.")
    if submit.HasField("sampling") == facts.is_encoder or submit.HasField("pooling") != facts.is_encoder:
        wanted = "embeds texts" if facts.is_encoder else "generates text"
        raise Refusal("unsupported_task", f"this engine {wanted}; the request asks for something else.")
    if submit.HasField("adapter") and not facts.max_adapters:
        raise Refusal("adapters_unsupported", "this engine serves no adapters. Start it with max_adapters above 0.")
    _check_types(submit, facts)
    if facts.is_encoder:
        _check_encoder(submit, facts)
    else:
        _check_sources(submit, facts)
        _check_positions(submit)
        _check_generation(submit, facts)


def _check_types(submit: Submit, facts: Facts) -> None:
    length, largest = len(submit.prompt), max([submit.answer_type, *submit.types])
    if submit.types and len(submit.types) != length:
        raise Refusal("invalid_value", f"types must be one a token. Given: {len(submit.types)} for {length} tokens.")
    if largest >= max(1, facts.token_types):
        raise Refusal("invalid_value", f"types must be below {max(1, facts.token_types)}. Given: {largest}.")


def _check_positions(submit: Submit) -> None:
    """An answer's positions go on from the last one: below the prompt's length, they stay inside of the window."""
    length, given = len(submit.prompt), submit.positions
    if given and (len(given) != length or max(given) >= length):
        message = f"positions must be one a token, and below {length}. Given: {len(given)}, up to {max(given)}."
        raise Refusal("invalid_value", message)


def _check_sources(submit: Submit, facts: Facts) -> None:
    """Of an encoder-decoder every request has some, of another model none."""
    lengths, tokens, biases = submit.source_lengths, submit.source_tokens, submit.source_biases
    if bool(lengths) != facts.is_seq2seq:
        wanted = (
            "needs a text for its encoder" if facts.is_seq2seq else "has no encoder, and the request a text for one"
        )
        raise Refusal("unsupported_task", f"this engine's model {wanted}.")
    if not lengths:
        return
    if min(lengths) < 1 or max(lengths) > facts.max_context:
        message = f"a text of the encoder must have 1 to {facts.max_context} tokens. Given: {min(lengths)} to "
        raise Refusal("prompt_too_long", f"{message}{max(lengths)}.")
    if sum(lengths) != len(tokens):
        raise Refusal("invalid_value", f"source lengths must sum to {len(tokens)}. Given: {sum(lengths)}.")
    if max(tokens) >= facts.vocab_size:
        raise Refusal("token_id_range", f"source ids must be below {facts.vocab_size}. Given: {max(tokens)}.")
    if biases and (len(biases) != len(lengths) or not all(map(math.isfinite, biases))):
        message = f"biases must be finite numbers, one for each of {len(lengths)} sources. Given: {len(biases)}."
        raise Refusal("invalid_value", message)
    if submit.positions:
        raise Refusal("invalid_value", "positions are for decoders; an encoder-decoder tells places by distance.")


def _check_encoder(submit: Submit, facts: Facts) -> None:
    length = len(submit.prompt)
    if length > facts.max_context:
        raise Refusal("prompt_too_long", f"a text must have at most {facts.max_context} tokens. Given: {length}.")
    if submit.positions:
        raise Refusal("invalid_value", "positions are for generation; an encoder's texts count from 0.")
    if submit.pooling.task_logits:
        if not facts.task_columns:
            raise Refusal("unsupported_task", "this engine's model has no task head; it embeds texts.")
        if output_bytes(submit, facts) > MAX_OUTPUT_BYTES:
            message = f"one answer may have at most {MAX_OUTPUT_BYTES} bytes. Given: {output_bytes(submit, facts)}."
            raise Refusal("invalid_value", message)


def output_bytes(submit: Submit, facts: Facts) -> int:
    """Bytes of the logits that an encoder request asks for; 0 for a vector, which is small."""
    if not submit.pooling.task_logits:
        return 0
    return 4 * facts.task_columns * (facts.task_rows or len(submit.prompt))


def _check_generation(submit: Submit, facts: Facts) -> None:
    sampling = submit.sampling
    length, new = len(submit.prompt), sampling.max_tokens
    if length + min(new, 1) > facts.max_context:
        raise Refusal(
            "context_length_exceeded",
            f"prompt and answer must have at most {facts.max_context} tokens. Given: a prompt of {length}.",
        )
    if not 1 <= sampling.num_sequences <= MAX_SEQUENCES:
        raise Refusal("invalid_value", f"sequences must be 1 to {MAX_SEQUENCES}. Given: {sampling.num_sequences}.")
    shares = (sampling.top_p, sampling.typical_p, sampling.top_p_decay)
    if not sampling.temperature >= 0 or not sampling.repetition_penalty > 0 or not all(0 < x <= 1 for x in shares):
        message = "temperature, repetition_penalty, top_p, typical_p or top_p_decay is outside of its range."
        raise Refusal("invalid_value", message)
    if sampling.HasField("beam"):
        _check_beam(sampling)
    named = [
        *sampling.logit_bias,
        *sampling.allowed_token_ids,
        *sampling.end_token_ids,
        *sampling.stop_token_ids,
        *sampling.logprob_token_ids,
        *(token for word in sampling.bad_words for token in word.ids),
    ]
    if named and max(named) >= facts.vocab_size:
        raise Refusal("token_id_range", f"token ids must be below {facts.vocab_size}. Given: {max(named)}.")
    if any(not word.ids for word in sampling.bad_words):
        raise Refusal("invalid_value", "bad words must not be empty.")
    probe = Request(0, 0, submit, 0.0)
    probe.sequences = [Sequence(0, probe, index, []) for index in range(sampling.num_sequences)]
    needed = probe.worst_case_blocks(block_size=facts.block_size, max_context=facts.max_context)
    if needed > facts.num_blocks:
        raise Refusal(
            "kv_capacity_exceeded",
            f"one request may hold at most {facts.num_blocks * facts.block_size} cache tokens on this server. "
            f"Given: {needed * facts.block_size}.",
        )


def _check_beam(sampling: Sampling) -> None:
    beam = sampling.beam
    if not 1 <= beam.num_answers <= sampling.num_sequences:
        message = f"answers must be 1 to the number of beams, {sampling.num_sequences}. Given: {beam.num_answers}."
        raise Refusal("invalid_value", message)
    if not math.isfinite(beam.length_penalty) or beam.early not in Beam.Early.values() or not sampling.max_tokens:
        raise Refusal("invalid_value", "length_penalty, early or max_tokens is outside of its range for a beam search.")
