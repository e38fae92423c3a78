"""The engine in process: `LLM` (E3)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_adapters import tiny_adapter

from trilithon.errors import FailedPrecondition, InvalidArgument
from trilithon_server import LLM, SamplingParams
from trilithon_server.constraint_rules import Constraint

TEXTS = ["Once upon a time", "The capital", "x"]


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_dir, kv_cache_bytes=4 << 20, num_threads=1) as model:
        yield model


def test_prompts_are_answered_in_order_and_alone_as_together(llm: LLM) -> None:
    """A list gives one output a prompt; texts and token ids are the same prompt."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
    together = llm.generate(TEXTS, params)
    alone = [llm.generate(text, params)[0] for text in TEXTS]
    ids = llm.generate(together[1].prompt_token_ids, params)

    assert [output.choices[0].text for output in together] == [output.choices[0].text for output in alone]
    assert ids[0].choices[0].token_ids == together[1].choices[0].token_ids
    assert len(together[0].choices[0].tokens) == 8
    assert len(together[0].choices[0].tokens[0].top) == 2


def test_seeds_repeat_and_best_of_ranks(llm: LLM) -> None:
    """The seed in an answer repeats it; `best_of` returns the likeliest, best first."""
    first = llm.generate(TEXTS[0], SamplingParams(max_tokens=6))[0].choices[0]
    again = llm.generate(TEXTS[0], SamplingParams(max_tokens=6, seed=first.seed))[0].choices[0]
    best = llm.generate(TEXTS[0], SamplingParams(max_tokens=6, seed=1, n=2, best_of=4))[0].choices

    assert again.token_ids == first.token_ids
    assert len(best) == 2
    assert best[0].cumulative_logprob >= best[1].cumulative_logprob


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    """The text ends before the stop string and names it; the engine is free afterwards."""
    params = SamplingParams(temperature=0, max_tokens=20)
    text = llm.generate(TEXTS[0], params)[0].choices[0].text
    stop = text[6:8]
    cut = llm.generate(TEXTS[0], SamplingParams(temperature=0, max_tokens=20, stop=(stop,)))[0].choices[0]

    assert cut.text == text[: text.index(stop)]
    assert (cut.matched_stop, cut.finish_reason.value) == (stop, "stop_sequence")


def test_a_part_of_a_prompt_is_scored(llm: LLM) -> None:
    """
    From a place on the log-probabilities are those of the whole prompt, whether what is before it was read already or
    not; a prompt's own first token has none.
    """
    prompts = [list(range(5, 5 + size)) for size in (40, 12, 3)]
    whole = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0))
    starts = [33, 1, 2]
    first, again = llm.score(prompts, starts), llm.score(prompts, starts)

    for output, start, tokens, cached in zip(whole, starts, first, again, strict=True):
        expected = [token.logprob for token in output.prompt_tokens[start - 1 :]]
        assert [token.logprob for token in tokens] == expected == [token.logprob for token in cached]
        assert [token.id for token in tokens] == output.prompt_token_ids[start:]


def test_wrong_parameters_and_constraints_are_the_callers_errors(llm: LLM) -> None:
    """What is refused over the wire is refused here, and the next call is answered."""
    with pytest.raises(InvalidArgument, match="temperature"):
        llm.generate(TEXTS, SamplingParams(temperature=-1))
    with pytest.raises(InvalidArgument) as refused:
        llm.generate(TEXTS, SamplingParams(constraint=Constraint(kind="regex", source="a(")))
    with pytest.raises(InvalidArgument, match="must not be empty"):
        llm.generate([[]])

    assert refused.value.code == "invalid_constraint"
    assert llm.generate("x", SamplingParams(max_tokens=3, temperature=0))[0].choices[0].token_ids


def test_E3_ranks_as_processes_equal_in_process(llm: LLM, tiny_dir: Path) -> None:
    """`LLM(tp=2)` gives the tokens of `LLM()`."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=10)
    with LLM(tiny_dir, tp=2, kv_cache_bytes=4 << 20, num_threads=1) as two:
        outputs = two.generate(TEXTS, params)

    expected = llm.generate(TEXTS, params)
    assert [o.choices[0].token_ids for o in outputs] == [o.choices[0].token_ids for o in expected]


def test_an_adapter_answers_by_name_and_by_directory(llm: LLM, tiny_dir: Path, tmp_path: Path) -> None:
    """`adapter` gives another answer than the base, the same by either way, and the base's again without it."""
    paths = [tiny_adapter(tmp_path / f"adapter-{seed}", tiny_dir, seed=seed) for seed in (1, 2)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def said(model: LLM, adapter: str | Path | None = None) -> list[int]:
        return list(model.generate(TEXTS[0], params, adapter=adapter)[0].choices[0].token_ids)

    with LLM(tiny_dir, kv_cache_bytes=4 << 20, num_threads=1, adapters={"first": paths[0]}, max_adapters=2) as model:
        base, first, second = said(model), said(model, "first"), said(model, paths[1])
        assert (said(model, paths[0]), said(model)) == (first, base)
        with pytest.raises(InvalidArgument, match="Names here: first") as unknown:
            said(model, "second")

    assert len({tuple(found) for found in (base, first, second)}) == 3
    assert base == said(llm)
    assert unknown.value.code == "adapter_not_found"
    with pytest.raises(FailedPrecondition, match="max_adapters"):
        said(llm, paths[0])


def test_embeddings(tiny_bert_dir: Path) -> None:
    """An encoder's `embed` gives one normalised vector a text; empty texts are refused by their tokens."""
    with LLM(tiny_bert_dir, num_threads=1) as encoder:
        vectors = encoder.embed(["a text", "another, longer text"])

    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1.0, 1.0], abs=1e-5)
