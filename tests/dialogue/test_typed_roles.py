"""A decoder that is told by token types who speaks: trained, exported and served at every layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import httpx
import pytest
from finetune_jobs import JobDir, make_job, write_rows
from served import serving
from task_rows import rows
from tiny import tiny_llama
from tiny_tokenizers import add_special_tokens, write_bpe_tokenizer

from trilithon_parallel.config import load_config
from trilithon_server.llm import LLM
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling import SamplingParams
from trilithon_server.tasks.dialogue_format import KNOWLEDGE, REFERENCE, TURN, DialogueFormat, Turn

TYPED = {"markers": "tokens", "roles": "types", "positions": "restart"}
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
PAST = [{"speaker": "target", "text": "I like ball"}, {"speaker": "other", "text": "so do I"}]
TALK = [{"speaker": "other", "text": "what is ball 3?"}]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose vocabulary has the marks."""
    path = tiny_llama(tmp_path_factory.mktemp("marked") / "model", vocab=387, scale=0.1, chat_template=False)
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    add_special_tokens(path, (TURN, REFERENCE, KNOWLEDGE), first=384)
    return path


def job(folder: Path, base: Path, **config: Any) -> JobDir:
    """Twenty rows of talk to learn, eight to judge by."""
    folder.mkdir()
    return make_job(
        folder,
        base,
        write_rows(folder / "train.jsonl", rows("grounded_dialogue", 20)),
        write_rows(folder / "valid.jsonl", rows("grounded_dialogue", 8, first=1000)),
        **{
            "task": "grounded_dialogue",
            "training": {"epochs": 2, "batch_size": 8},
            "optimizer": {"lr": 5e-3},
            "tuning": {"kind": "full"},
            "options": TYPED,
            **config,
        },
    )


@pytest.fixture(scope="module")
def trained(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """Trained in one process, its export verified."""
    return job(tmp_path_factory.mktemp("typed") / "job", base_dir).walk()


def packed(model_dir: Path, **changed: Any) -> Sequenced:
    """What the server makes of the conversation below."""
    with LLM(model_dir, dtype="float32", kv_cache_bytes=1 << 22) as llm:
        found = DialogueFormat(**TYPED).pack(  # type: ignore[arg-type]  # by name
            [Turn("other", TALK[0]["text"])],
            llm.tokenizer,
            references=[[Turn(turn["speaker"], turn["text"]) for turn in PAST]],  # type: ignore[arg-type]  # literals
        )
    sequence = Sequenced(ids=found.tokens, types=found.types, positions=found.positions, answer_type=found.answer_type)
    return dataclasses.replace(sequence, **changed)


def said(model_dir: Path, prompt: Sequenced, *, tp: int = 1, pp: int = 1) -> tuple[list[int], list[float]]:
    """Eight greedy tokens and their log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    with LLM(model_dir, tp=tp, pp=pp, dtype="float32", kv_cache_bytes=1 << 22) as llm:
        choice = llm.generate(prompt, params)[0].choices[0]
    return list(choice.token_ids), [token.logprob for token in choice.tokens]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS[1:])
def test_acc_D09_types_are_learned_alike_at_every_layout(
    trained: JobDir, base_dir: Path, tmp_path: Path, tp: int, pp: int
) -> None:
    """Losses of the job are those of one process; the base had no table of types, the export has five."""
    other = job(tmp_path / "job", base_dir, parallel={"tp": tp, "pp": pp})
    for phase in ("validate", "prepare"):
        other.phase(phase)
    other.train()

    assert trained.losses() == pytest.approx(other.losses(), rel=1e-5)
    assert load_config(base_dir).token_types == 0
    assert load_config(trained.root / "export").token_types == 5


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS[1:])
def test_acc_D09_types_are_served_alike_at_every_layout(trained: JobDir, tp: int, pp: int) -> None:
    """
    Greedy tokens and log-probabilities (1e-5) of the export. Types and positions are part of it: other ones say
    something else.
    """
    export = trained.root / "export"
    prompt = packed(export)
    tokens, logprobs = said(export, prompt)
    tokens_there, logprobs_there = said(export, prompt, tp=tp, pp=pp)

    assert tokens == tokens_there
    assert logprobs == pytest.approx(logprobs_there, abs=1e-5)
    for changed in ({"types": (0,) * len(prompt.ids)}, {"positions": tuple(range(len(prompt.ids)))}):
        _, others = said(export, dataclasses.replace(prompt, **changed))
        assert logprobs != pytest.approx(others, abs=1e-5)


def test_acc_D09_a_server_reads_the_task_file_of_the_export(trained: JobDir) -> None:
    """`/v1/dialogue` packs by it: what comes back is what the engine writes behind the typed sequence."""
    export = trained.root / "export"
    with LLM(export, dtype="float32", kv_cache_bytes=1 << 22) as llm:
        alone = llm.generate(packed(export), SamplingParams(temperature=0, max_tokens=8))[0].choices[0]
    with serving(export, "--dtype", "float32") as server:
        body = {"conversation": TALK, "references": [PAST], "temperature": 0, "max_tokens": 8}
        told = httpx.post(f"{server.url}/v1/dialogue", json=body, timeout=60).json()

    assert told["candidates"][0]["text"] == alone.text.strip()
    assert told["usage"]["prompt_tokens"] == len(packed(export).ids)


def test_acc_D09_what_the_base_cannot_hold_is_refused(base_dir: Path, tmp_path: Path) -> None:
    """An adapter has no place for a new table of types; a tokenizer without the marks cannot write them."""
    adapter = job(tmp_path / "adapter", base_dir, tuning={"kind": "lora"}).try_phase("validate")["error"]
    plain = tiny_llama(tmp_path / "plain", scale=0.1)
    marks = job(tmp_path / "plain_job", plain).try_phase("validate")["error"]
    words = job(tmp_path / "words", base_dir, options={"roles": "types"}).try_phase("validate")["error"]

    assert (adapter["code"], adapter["param"]) == ("lora_not_servable", "tuning.kind")
    assert "5 token types" in adapter["message"]
    assert (marks["code"], marks["param"]) == ("invalid_config", "options")
    assert all(mark in marks["message"] for mark in (TURN, REFERENCE, KNOWLEDGE))
    assert "needs markers: tokens" in words["message"]
