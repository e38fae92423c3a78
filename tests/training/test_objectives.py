"""Pretraining of every family by its own objective: next token, masked tokens, corrupted spans; token types."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import tiny_bert, tiny_gpt2, tiny_t5
from tiny_tokenizers import write_wordpiece_tokenizer
from training_runs import LIMIT_S, Run, make_run, write_tokens

from trilithon_parallel.config import load_config

pytestmark = pytest.mark.timeout(LIMIT_S * 2)

FAMILIES = {
    "gpt2": (transformers.GPT2LMHeadModel, {"tp": 2}, {"data": {"reset_attention": True, "reset_positions": True}}),
    "bert": (transformers.BertForMaskedLM, {"pp": 2}, {"data": {"sentence_pairs": True}}),
    "t5": (transformers.T5ForConditionalGeneration, {"pp": 2, "schedule": "gpipe"}, {}),
}


def family_run(folder: Path, family: str, layout: dict[str, Any]) -> Run:
    """A run of a tiny model of that family, with a tokenizer that has what its objective needs."""
    run = make_run(folder, layout=layout)
    model = folder / "model"
    shutil.rmtree(model)
    if family == "gpt2":
        tiny_gpt2(model)
    elif family == "bert":
        tiny_bert(model, mlm_head=True)
    else:
        tiny_t5(model)
        write_wordpiece_tokenizer(model, vocab=256, context=64)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # its spare tokens become sentinels
            text = (model / name).read_text()
            for index in range(57):
                text = text.replace(f"<|reserved_{index}|>", f"<extra_id_{index}>")
            (model / name).write_text(text)
    (folder / "tokens.bin").unlink()
    (folder / "tokens.idx").unlink()
    (folder / "tokens.json").unlink(missing_ok=True)
    write_tokens(folder / "tokens", vocab=199 if family != "gpt2" else 384)
    if family != "gpt2":
        # Few tokens of a sample count, so it takes more samples.
        run.settings["training"] |= {"steps": 50, "learning_rate": {"peak": 5e-3, "warmup": 0.1}}
    for section, values in FAMILIES[family][2].items():
        run.settings[section] |= values
    return run.change("run", evaluate_every=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_E8_each_family_trains_at_any_layout_and_loads_in_transformers(family: str, tmp_path: Path) -> None:
    """The loss falls, two ranks have one rank's losses, and the checkpoint is a directory that transformers loads."""
    kind, layout, _ = FAMILIES[family]
    one = family_run(tmp_path / "one", family, {})
    one.finish()
    two = family_run(tmp_path / "two", family, layout)
    two.finish(ranks=2)
    directory = max(two.directory.glob("step_*"))
    _, report = kind.from_pretrained(directory, output_loading_info=True)

    assert sum(one.losses()[-3:]) / 3 < one.losses()[0] - 0.2
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_a_decoder_with_token_types_begins_as_the_one_without(tmp_path: Path) -> None:
    """`type_vocab_size` adds a table of zeros: the first loss is that of the same model without it."""
    plain = make_run(tmp_path / "plain").change("training", steps=2)
    plain.finish()
    typed = make_run(tmp_path / "typed").change("training", steps=2)
    path = typed.folder / "model" / "config.json"
    path.write_text(path.read_text().replace("{", '{"type_vocab_size": 2,', 1))
    typed.finish()

    assert load_config(typed.directory / "step_00000002").token_types == 2
    assert typed.losses()[0] == plain.losses()[0]
