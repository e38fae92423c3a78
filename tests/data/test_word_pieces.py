"""Word pieces learned from texts: read back by us and by transformers with the same ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.train_tokenizer import train_tokenizer
from trilithon_parallel.data.word_pieces import SPECIAL_TOKENS
from trilithon_parallel.tokenizer import load_tokenizer

TEXTS = [
    "Methylmalonic acidemia follows from mutations of methylmalonyl-CoA mutase, an adenosylcobalamin enzyme.",
    "Acidemia and anemia: two patients with mutations, one without; methionine fell from 31 to 9 micromol/l.",
    "Cobalamin (vitamin B12) deficiency raises methylmalonic acid. Caf\u00e9 au lait spots were seen in both.",
] * 3
HARD = [
    "",
    "  Methyl  groups ",
    "na\u00efve b12?!",
    "caf\u00e9 \u6f22\u5b57",
    "x" * 200,
    "[MASK] acid [SEP]",
    "42% (p<0.05)",
]


@pytest.fixture(scope="module", params=[True, False], ids=["lower", "cased"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 170 ids."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    text, lower = folder / "text.txt", bool(request.param)
    return train_tokenizer([text], folder / "tok", vocab_size=170, kind="wordpiece", lowercase=lower).path


def test_special_tokens_come_first_and_frame_a_text(trained: Path) -> None:
    """[PAD], [UNK], [CLS], [SEP], [MASK] are ids 0 to 4; a text stands between [CLS] and [SEP]."""
    tokenizer = load_tokenizer(trained)

    assert [tokenizer.id_to_piece(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert tokenizer.vocab_size == 170
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    ids = tokenizer.encode("acid", add_special_tokens=True)
    assert ids == [2, *tokenizer.encode("acid", add_special_tokens=False), 3]


def test_frequent_words_are_whole(trained: Path) -> None:
    """What the texts repeat is one piece, what they never hold is several."""
    tokenizer = load_tokenizer(trained)

    assert len(tokenizer.encode("mutations", add_special_tokens=False)) == 1
    assert len(tokenizer.encode("tumour", add_special_tokens=False)) > 1


def test_case_is_kept_or_lowered(trained: Path) -> None:
    """With `lowercase`, Cobalamin is cobalamin; without, it is not."""
    tokenizer = load_tokenizer(trained)
    cobalamin = [tokenizer.encode(word, add_special_tokens=False) for word in ("Cobalamin", "cobalamin")]

    assert (cobalamin[0] == cobalamin[1]) is (trained.parent.name == "pieces0")


def test_transformers_reads_the_same_ids(trained: Path) -> None:
    """By tokenizer.json, and by vocab.txt alone, pairs included."""
    import transformers

    ours, theirs = load_tokenizer(trained), transformers.AutoTokenizer.from_pretrained(trained)

    assert (theirs.pad_token_id, theirs.cls_token_id, theirs.mask_token_id) == (0, 2, 4)
    for text in [*HARD, *TEXTS]:
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True), text
    pair = theirs("acid", "anemia")
    assert pair["token_type_ids"] == [0] * (pair["input_ids"].index(3) + 1) + [1] * (
        len(pair["input_ids"]) - pair["input_ids"].index(3) - 1
    )
    assert len((trained / "vocab.txt").read_text("utf-8").splitlines()) == 170


def test_training_is_repeatable(trained: Path, tmp_path: Path) -> None:
    """The same texts give the same files, byte for byte."""
    lower = trained.parent.name == "pieces0"
    again = train_tokenizer(
        [trained.parent / "text.txt"], tmp_path / "again", vocab_size=170, kind="wordpiece", lowercase=lower
    )

    for path in trained.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes(), path.name


def test_R11_vocabularies_that_cannot_be(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """Too small, too large for the texts, an option of another kind: the bound is told, and nothing is written."""
    rows = write_rows("rows.jsonl", ["one little text"])

    with pytest.raises(DataError, match=r"vocab_size must be at least 6: .*Given: 5"):
        train_tokenizer([rows], tmp_path / "tok", vocab_size=5, kind="wordpiece")
    with pytest.raises(DataError, match=r"at least \d+ for the characters of these texts\. Given: 8"):
        train_tokenizer([rows], tmp_path / "tok", vocab_size=8, kind="wordpiece")
    with pytest.raises(DataError, match=r"vocab_size must be at most \d+ for these texts\. Given: 9000"):
        train_tokenizer([rows], tmp_path / "tok", vocab_size=9000, kind="wordpiece")
    with pytest.raises(DataError, match=r"lowercase goes with kind wordpiece only.*Given: bpe"):
        train_tokenizer([rows], tmp_path / "tok", vocab_size=600, kind="bpe", lowercase=True)
    assert not (tmp_path / "tok").exists()
