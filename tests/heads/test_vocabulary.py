"""An encoder with another vocabulary: which rows are kept, which are means, and that the directory is a model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.data.train_tokenizer import train_tokenizer
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_parallel.weights.loader import load_state
from trilithon_parallel.weights.vocabulary import change_vocabulary

TABLE = "model.embed_tokens.weight"
TEXT = "methyl groups of methylmalonic acid and methylmalonyl coenzyme, " * 8


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word pieces of a few chemical words."""
    folder = tmp_path_factory.mktemp("vocabulary")
    letters = " ".join(
        f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz0123456789" for b in "abcdefghijklmnopqrstuvwxyz0123456789"
    )
    (folder / "text.txt").write_text(f"{TEXT}\n{TEXT}\n{letters}\n{letters} \u0410 \u0410", encoding="utf-8")
    return train_tokenizer([folder / "text.txt"], folder / "tok", vocab_size=400, kind="wordpiece", lowercase=True).path


@pytest.fixture(scope="module")
def changed(minilm_dir: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with these."""
    out = tmp_path_factory.mktemp("changed") / "model"
    found = change_vocabulary(minilm_dir, vocabulary, out)
    assert found.kept + found.averaged + found.unknown == 400
    assert found.averaged > 0
    return out


def test_kept_and_averaged_rows(changed: Path, minilm_dir: Path) -> None:
    """A piece of both keeps its row bit for bit; a new one is the mean of what the old vocabulary made of it."""
    old, new = load_tokenizer(minilm_dir), load_tokenizer(changed)
    before = load_state(minilm_dir, config=load_config(minilm_dir))[TABLE]
    after = load_state(changed, config=load_config(changed))[TABLE]
    known = {old.id_to_piece(i): i for i in range(old.vocab_size)}
    means = 0
    for i in range(new.vocab_size):
        piece = new.id_to_piece(i)
        if piece in known:
            assert torch.equal(after[i], before[known[piece]]), piece
        elif parts := old.encode(piece.removeprefix("##"), add_special_tokens=False):
            torch.testing.assert_close(after[i], before[parts].double().mean(0).float(), rtol=0, atol=0)
            means += 1
    assert means > 0


def test_all_else_stays(changed: Path, minilm_dir: Path) -> None:
    """Layers, positions and norms are the old model's, bit for bit; its pooling files go along."""
    before = load_state(minilm_dir, config=load_config(minilm_dir))
    after = load_state(changed, config=load_config(changed))

    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != TABLE)
    assert load_tokenizer(changed).encode("methylmalonic", add_special_tokens=False)
    assert (changed / "modules.json").read_bytes() == (minilm_dir / "modules.json").read_bytes()
    assert not (changed / "special_tokens_map.json").exists()  # the old vocabulary's, which the new one has not


def test_R11_a_decoder_and_a_directory_that_exists_are_refused(
    smollm2_dir: Path, minilm_dir: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """Both are told before anything is written."""
    with pytest.raises(ModelError, match=r"vocabulary of an encoder.*Given: a LlamaForCausalLM.*Allowed: a BERT"):
        change_vocabulary(smollm2_dir, vocabulary, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        change_vocabulary(minilm_dir, vocabulary, tmp_path / "out")
