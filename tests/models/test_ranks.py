"""Encoder-decoders and masked-LM heads on several ranks; the cases are in rank_cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from ranks import LIMIT_S, load_script, run_ranks
from tiny import tiny_bert, tiny_t5

from trilithon_parallel.config import load_config
from trilithon_parallel.weights.export import export_model
from trilithon_parallel.weights.loader import load_state

SCRIPT = Path(__file__).with_name("rank_cases.py")


CASES = load_script(SCRIPT)


def _expected(model_dir: Path) -> torch.Tensor:
    """What transformers computes of the ranks' inputs."""
    step = CASES.inputs(torch.float32)
    kind = transformers.BertForMaskedLM if model_dir.name == "masked-lm" else transformers.T5ForConditionalGeneration
    model: Any = kind.from_pretrained(model_dir, dtype=torch.float32).eval()
    texts = [step.tokens[None, start:stop] for start, stop in pairwise(CASES.ENCODER_BOUNDS)]
    with torch.no_grad():
        if model_dir.name == "masked-lm":
            return torch.cat([model(text).logits[0] for text in texts])
        rows = []
        for i, (start, stop) in enumerate(pairwise(CASES.DECODER_BOUNDS)):
            passages = texts[i * CASES.PASSAGES : (i + 1) * CASES.PASSAGES]
            memory = torch.cat([model.encoder(text).last_hidden_state for text in passages], 1)
            decoder_tokens = step.decoder_tokens[None, start:stop]
            rows.append(model(encoder_outputs=(memory,), decoder_input_ids=decoder_tokens).logits[0])
        return torch.cat(rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Exports of tiny models whose sizes ranks don't divide, each with the logits that transformers has of the original.

    The logits go into a folder of their own: whatever lies beside the weights would be read as weights.
    """
    root = tmp_path_factory.mktemp("model_ranks")
    shape = {"encoder_layers": 3, "decoder_layers": 3, "hidden": 60, "heads": 5, "head_dim": 8, "ffn": 50, "vocab": 251}
    tiny_t5(root / "original" / "t5", **shape)
    tiny_t5(root / "original" / "t5-gated", gated=True, tied=False, **shape)
    tiny_bert(root / "original" / "masked-lm", layers=4, hidden=60, heads=5, ffn=90, vocab=251, mlm_head=True)
    for name in CASES.MODELS:
        original, exported = root / "original" / name, root / "models" / name
        config = load_config(original)
        export_model(load_state(original, config=config), config, exported, side_files_from=None)
        (exported / "expected").mkdir()
        safetensors.torch.save_file({"logits": _expected(original)}, exported / "expected" / "logits.safetensors")
    return root / "models"


@pytest.fixture(scope="module")
def outcomes(models: Path) -> Callable[[int], list[dict[str, str]]]:
    """A function from a number of ranks to what each rank reports of each case."""

    @functools.cache
    def run(world_size: int) -> list[dict[str, str]]:
        work_dir = models.parent / f"world{world_size}"
        work_dir.mkdir()
        (work_dir / "models").symlink_to(models)
        return run_ranks(SCRIPT, world_size, work_dir)

    return run


BARS = {"logits": "E10", "gradients": "E8", "recompute": "E8"}
ALL = [
    pytest.param(size, name, id=f"{BARS[name.split('-')[0]]}-{size}ranks-{name}")
    for size in CASES.LAYOUTS
    for name in CASES.case_names(size)
]


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(("world_size", "case"), ALL)
def test_E8_E10_ranks(world_size: int, case: str, outcomes: Callable[[int], list[dict[str, str]]]) -> None:
    """
    Each case holds on each rank; what a case checks is said in rank_cases.py.

    Inverse: leaving out the paper's f before the encoder's output is read, or before the bias of cross-attention, turns
    `gradients-t5-tp2*` red; not summing the gradients of copies turns `gradients-*pp2` red; an encoder's output that is
    handed on without a gradient turns four stages red.
    """
    reports = outcomes(world_size)

    assert len(reports) == world_size
    assert [report.get(case, "never ran") for report in reports] == ["ok"] * world_size
