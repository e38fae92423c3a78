"""
In-process use: the engine without fronts.

    from trilithon_server import LLM, SamplingParams

    with LLM("models/smollm2") as llm:
        for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8)):
            print(output.choices[0].text)

Parameters mean what they mean over HTTP and gRPC: the same validator, the same engine, the same text.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from trilithon.errors import InvalidArgument
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.adapters import adapter_in
from trilithon_server.assembly import Choice, FinishReason, TokenInfo, engine_error, token_info
from trilithon_server.config_sources import is_seq2seq
from trilithon_server.engine.inprocess import InProcessEngine
from trilithon_server.engine.local import LocalEngine
from trilithon_server.engine.request import answers_told
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Abort, Adapter, Hello, Pooling, SequenceDelta, Submit, ToEngine
from trilithon_server.generation import best
from trilithon_server.prompts import Prepared, Sequenced, answer_room, check_reading
from trilithon_server.sampling import SamplingParams, to_wire, validate
from trilithon_server.text.detokenizer import TokenTexts
from trilithon_server.validation import Bounds, Violations

Prompt = str | Sequence[int] | Sequenced


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer: its text, token ids and, with `logprobs`, what is known of each token."""

    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason
    tokens: Sequence[TokenInfo]
    cumulative_logprob: float
    matched_stop: str
    constraint_complete: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What became of one prompt: its answers, best first with `best_of`."""

    prompt_token_ids: Sequence[int]
    choices: Sequence[Completion]
    cached_tokens: int
    prompt_tokens: Sequence[TokenInfo]
    """With `prompt_logprobs`: the prompt's tokens from the second on."""


@dataclass(slots=True)
class _Pending:
    prepared: Prepared
    choices: list[Choice]
    cached_tokens: int = 0
    prompt_tokens: list[TokenInfo] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)


class LLM:
    """
    A model ready to generate. A context manager; blocking; one call at a time.

    Args:
        model: a model directory.
        tp: tensor-parallel ranks per stage; with more than one rank in all, ranks are processes of their own.
        pp: pipeline stages.
        adapters: directories of adapters (PEFT's layout) by the names that `generate` uses.
        options: further fields of `EngineSpec`, such as dtype, max_context, kv_cache_bytes, max_batch_tokens.
    Raises:
        ValueError: the files of an adapter are missing.
        ModelError: the model can't be served, or the memory does not suffice (one rank).
        LocalEngineError: the same, from ranks that are processes.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tp: int = 1,
        pp: int = 1,
        adapters: Mapping[str, str | Path] | None = None,
        **options: Any,
    ) -> None:
        is_invariant = options.get("device", "cpu") == "cpu" and not is_seq2seq(Path(model))
        chosen = {"batch_invariant": is_invariant, "max_adapters": len(adapters or {})}
        options = chosen | options
        self._adapters = {
            name: adapter_in(Path(path), name=name, base="llm").wire for name, path in (adapters or {}).items()
        }
        spec = EngineSpec(name="llm", model_dir=str(Path(model).resolve()), tp=tp, pp=pp, **options)
        self.tokenizer = load_tokenizer(Path(spec.model_dir))
        self._texts = TokenTexts(self.tokenizer)
        self._engine = InProcessEngine(spec) if spec.world_size == 1 else LocalEngine(spec)
        self._handle = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        adapter: str | Path | None = None,
    ) -> list[Output]:
        """
        Answers to prompts, in their order; all of them run in one batch.

        Args:
            prompts: a text, token ids, ids with types and positions of their own, or a list of these. An
                encoder-decoder's encoder reads them.
            params: how; None for the defaults.
            adapter: whose answers: one of `adapters` by its name, or a directory; None: the model's own. A directory
                needs room, `max_adapters` above 0.
        Raises:
            InvalidArgument: every broken rule of `params` and the prompts, or no such adapter; nothing was run.
            FailedPrecondition: the adapter cannot be loaded, or there is no room for any.
            TrilithonError: the engine could not finish a prompt; the others were dropped.
        """
        checked = validate((params or SamplingParams()).given(), self._bounds)
        return [self._output(item, checked) for item in self._answered(_as_list(prompts), checked, adapter)]

    def score(
        self, prompts: Sequence[Prompt], starts: Sequence[int], *, adapter: str | Path | None = None
    ) -> list[list[TokenInfo]]:
        """
        Log-probabilities of each prompt's tokens from a place on; what stands before is read, or found in the cache.

        Args:
            prompts: as for `generate`.
            starts: of each the first token that is wanted, from 1.
        Raises:
            InvalidArgument, FailedPrecondition, TrilithonError: as for `generate`.
        """
        checked = validate(SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0).given(), self._bounds)
        return [item.prompt_tokens for item in self._answered(prompts, checked, adapter, starts)]

    def _answered(
        self,
        prompts: Sequence[Prompt],
        checked: SamplingParams,
        adapter: str | Path | None,
        starts: Sequence[int] | None = None,
    ) -> list[_Pending]:
        """Every prompt with what the engine said to it."""
        if self._engine.hello.seq2seq:
            found = Violations()
            check_reading(checked, found)
            found.raise_if_any()
        bounds, wanted = self._bounds, None if adapter is None else self._adapter(adapter)
        submits, pending = [], {}
        for prompt, start in zip(prompts, starts or [0] * len(prompts), strict=True):
            prepared = self._prepare(prompt, checked)
            room = answer_room(prepared, checked, bounds, self._engine.hello)
            seed = checked.seed if checked.seed is not None else secrets.randbits(63)
            sampling = to_wire(
                checked,
                seed=seed,
                max_tokens=room,
                end_token_ids=self.tokenizer.eos_ids,
                reset_token_ids=self._texts.sentence_ends if checked.top_p_decay is not None else (),
                bad_words=self._bad_words(checked, bounds),
            )
            choices = [
                Choice(index=i, texts=self._texts, params=checked, seed=seed, with_tokens=checked.logprobs is not None)
                for i in range(checked.num_told)
            ]
            submit = self._submit(prepared.packed, checked)
            submit.sampling.CopyFrom(sampling)
            submit.sampling.prompt_logprobs_from = start
            if wanted is not None:
                submit.adapter.CopyFrom(wanted)
            submits.append(submit)
            pending[submit.handle] = _Pending(prepared, choices)
        self._run(submits, pending)
        return list(pending.values())

    @property
    def _bounds(self) -> Bounds:
        hello = self._engine.hello
        return Bounds(vocab_size=hello.vocab_size, max_context=hello.max_context_tokens)

    @property
    def hello(self) -> Hello:
        """What the engine says of itself: digest, sizes, layout."""
        return self._engine.hello

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, kind: str = "MEAN", normalize: bool = True
    ) -> list[list[float]]:
        """
        One vector a prompt, from an encoder.

        Args:
            prompts: a text, token ids, or a list of either.
            kind: how a text's vectors become one: MEAN, FIRST or LAST.
            normalize: to length 1.
        Raises:
            InvalidArgument: a prompt is empty or too long, or the model is no encoder.
        """
        submits, pending = [], {}
        for prompt in _as_list(prompts):
            prepared = self._prepare(prompt, SamplingParams())
            submit = self._submit(prepared.packed, SamplingParams())
            submit.pooling.CopyFrom(Pooling(kind=Pooling.Kind.Value(kind), normalize=normalize))
            submits.append(submit)
            pending[submit.handle] = _Pending(prepared, [])
        self._run(submits, pending)
        return [item.embedding for item in pending.values()]

    def close(self) -> None:
        """End the ranks; idempotent."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _adapter(self, adapter: str | Path) -> Adapter:
        known = self._adapters.get(str(adapter))
        if known is not None:
            return known
        try:
            return adapter_in(Path(adapter), name=str(adapter), base="llm").wire
        except ValueError as error:
            message = f"{error} Names here: {', '.join(self._adapters) or 'none'}."
            raise InvalidArgument(message, code="adapter_not_found") from None

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> Prepared:
        if isinstance(prompt, Sequenced):
            return Prepared.by_task(prompt)
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=params.add_bos is not False)
            bos = self.tokenizer.bos_id
            if params.add_bos and bos is not None and ids[:1] != [bos]:
                ids = [bos, *ids]
        else:
            ids = list(prompt)
        dropped = max(0, len(ids) - params.truncate_prompt_tokens) if params.truncate_prompt_tokens else 0
        start = self.hello.decoder_start_id if self.hello.seq2seq else None
        return Prepared.of(ids[dropped:], start, dropped=dropped, source=prompt if isinstance(prompt, str) else None)

    def _submit(self, prompt: Sequenced, params: SamplingParams) -> Submit:
        self._handle += 1
        submit = prompt.to_wire()
        submit.MergeFrom(
            Submit(
                handle=self._handle,
                cache_salt=params.cache_salt.encode(),
                bypass_cache=params.bypass_cache,
                priority=params.priority,
                queue_timeout_ms=params.queue_timeout_ms,
                time_limit_ms=params.time_limit_ms,
            )
        )
        return submit

    def _bad_words(self, params: SamplingParams, bounds: Bounds) -> tuple[tuple[int, ...], ...]:
        found, sequences = Violations(), dict[tuple[int, ...], None]()
        for i, word in enumerate(params.bad_words):
            for text in (word, " " + word.lstrip(" ")):
                ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
                if len(ids) > bounds.max_bad_word_tokens:
                    rule = f"must have at most {bounds.max_bad_word_tokens} tokens"
                    found.add(f"bad_words[{i}]", rule, given=f"{len(ids)} tokens")
                elif ids:
                    sequences[ids] = None
        found.raise_if_any()
        return tuple(sequences)

    def _run(self, submits: list[Submit], pending: dict[int, _Pending]) -> None:
        unfinished = {(submit.handle, i) for submit in submits for i in range(answers_told(submit))}
        for submit in submits:
            self._engine.send(ToEngine(submit=submit))
        if not unfinished:
            return
        try:
            for step in self._engine.steps(timeout_s=600.0):
                for delta in step.deltas:
                    if delta.handle in pending and self._take(delta, pending[delta.handle]):
                        unfinished.discard((delta.handle, delta.index))
                if not unfinished:
                    return
        finally:
            for handle in {handle for handle, _ in unfinished}:
                self._engine.send(ToEngine(abort=Abort(handle=handle, index=-1, cause="cancelled")))

    def _take(self, delta: SequenceDelta, item: _Pending) -> bool:
        """Take what is new of one answer; True when it has ended."""
        if delta.error.code in _CALLERS_ERRORS:
            raise InvalidArgument(delta.error.message, code=delta.error.code)
        if delta.HasField("started"):
            item.cached_tokens = delta.started.cached_tokens
        item.prompt_tokens += [token_info(self._texts, token) for token in delta.prompt_tokens]
        if delta.HasField("error"):
            raise engine_error(delta)
        if not item.choices:
            item.embedding += delta.embedding
            return bool(delta.finish)
        choice = item.choices[delta.index]
        if choice.finish is None and choice.feed(delta):
            self._engine.send(ToEngine(abort=Abort(handle=delta.handle, index=delta.index, cause="stop_string")))
        return choice.finish is not None

    def _output(self, item: _Pending, params: SamplingParams) -> Output:
        kept = item.choices if params.num_told == params.n else best(item.choices, params.n)
        return Output(
            prompt_token_ids=item.prepared.ids,
            choices=[self._completion(choice) for choice in kept],
            cached_tokens=item.cached_tokens,
            prompt_tokens=item.prompt_tokens,
        )

    def _completion(self, choice: Choice) -> Completion:
        text, tokens, ids = choice.take()
        assert choice.finish is not None
        return Completion(
            text=text,
            token_ids=ids,
            finish_reason=choice.finish,
            tokens=tokens,
            cumulative_logprob=choice.cumulative_logprob,
            matched_stop=choice.matched_stop,
            constraint_complete=choice.constraint_complete,
            seed=choice.seed,
        )


# What the engine refuses and the caller can mend; elsewhere the front has checked these before.
_CALLERS_ERRORS = frozenset(
    (
        "invalid_constraint",
        "invalid_value",
        "kv_capacity_exceeded",
        "context_length_exceeded",
        "prompt_too_long",
        "empty_prompt",
        "token_id_range",
        "unsupported_task",
    )
)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a text, or a list that begins with a token id, is one."""
    if isinstance(prompts, str | Sequenced):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items
