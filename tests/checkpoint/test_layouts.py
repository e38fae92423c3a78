"""Saved at one layout, loaded at another: every element of weights and optimizer comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint.checkpoint_cases import LAYOUTS, MODELS, Layout, named, world_size
from ranks import run_ranks
from tiny import tiny_gpt2, tiny_llama

SCRIPT = Path(__file__).with_name("checkpoint_cases.py")

Outcomes = dict[str, list[str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What every rank says of each (model, layout that saved, layout that loads)."""
    root = tmp_path_factory.mktemp("layouts")
    # Nothing divides: 3 groups of 3 heads are padded at tp 2, ffn and vocabulary are odd; GPT-2's files are transposed.
    tiny_llama(root / "models/llama", layers=4, hidden=36, heads=9, groups=3, ffn=51, vocab=391, dtype="bfloat16")
    tiny_gpt2(root / "models/gpt2", layers=4, hidden=30, heads=5, vocab=391, context=32)
    said: Outcomes = {}
    for action in ("save", "load"):
        for size in sorted({world_size(layout) for layout in LAYOUTS}):
            work_dir = root / f"{action}{size}"
            work_dir.mkdir()
            for rank in run_ranks(SCRIPT, size, work_dir, root / "models", root / "runs", action):
                for case, outcome in rank.items():
                    said.setdefault(f"{action}-{case}", []).append(outcome)
    return said


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", LAYOUTS, ids=named)
@pytest.mark.parametrize("target", LAYOUTS, ids=named)
def test_E7_saved_at_one_layout_loads_at_another(
    outcomes: Outcomes, model: str, source: Layout, target: Layout
) -> None:
    """
    Weights, masters and moments are bitwise equal as global tensors for all pairs of layouts.

    Seen elsewhere: conversion at tp=1 alone (Megatron-LM#966, #1708), optimizer state that does not reshard (#1517,
    #659), a tied head in two places (nanotron#221, #106), a padded vocabulary in the files (Megatron-LM#1754), fewer
    key/value groups than ranks (ms-swift#8219).
    Inverse: seen to fail with rectangles written at their rank's own place instead of the global one, and with GPT-2's
    matrices written untransposed.
    """
    saved = outcomes[f"save-{model}-{named(source)}-{named(source)}"]
    loaded = outcomes[f"load-{model}-{named(source)}-{named(target)}"]

    assert saved == ["ok"] * world_size(source)
    assert loaded == ["ok"] * world_size(target)


def test_R10_what_fails_on_one_rank_fails_on_all_with_one_sentence(tmp_path: Path) -> None:
    """
    A wrong piece, a missing piece, a full disk, a flipped byte, each seen by one rank: both say it, nothing hangs.

    Inverse: seen to fail, the other rank in a collective without its peer, with errors raised where they occur instead
    of agreed on.
    """
    tiny_llama(tmp_path / "models/llama", layers=4, hidden=36, heads=9, groups=3, ffn=51, vocab=391, dtype="bfloat16")
    ranks = run_ranks(SCRIPT, 2, tmp_path, tmp_path / "models", tmp_path / "runs", "fail")
    assert ranks[0] == ranks[1]
    said = ranks[0]["said"]

    model = "model-00001-of-00002.safetensors tensor model.embed_tokens.weight"
    assert said[0] == f"checkpoint_mismatch: rank 1: {model} is bfloat16. Given: float64."
    assert said[1].startswith(f"checkpoint_coverage: each of the 14076 elements of {model} must be given exactly once")
    assert said[2].startswith("checkpoint_disk_full: rank 1: there is no room left for the checkpoint: No space left")
    assert said[3] == "ok"
    damaged = "rank 1: step_00000002/model-00002-of-00002.safetensors does not fit its checksum"
    assert said[4].startswith(f"checkpoint_corrupt: {damaged}")
    assert said[5] == ".lock latest step_00000002"


def test_E7_a_load_at_tp_2_holds_its_half_of_the_model(tmp_path: Path) -> None:
    """
    The peak of a rank's memory, weights and optimizer together, is under 0.6 of the model plus its largest tensor.

    Inverse: seen to fail with whole tensors read, cut, and kept.
    """
    for action in ("save-big", "load-big"):
        ranks = run_ranks(SCRIPT, 2, tmp_path, tmp_path / "models", tmp_path / "runs", action)

    for rank in ranks:
        assert rank["grown"] < 0.6 * rank["whole"] + rank["largest"], rank
