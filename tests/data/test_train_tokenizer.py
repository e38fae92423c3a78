"""A vocabulary from texts: read back by us, by SentencePiece and by transformers, with the same ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.train_tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer

_SYLLABLES = ("ba", "con", "di", "ten", "lo", "ru", "ment", "ing", "sha", "qu", "est", "or")
_WORDS = [a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in ("", "s", "ed")]
LEARNED = [" ".join(_WORDS[(i * 7 + j * j * 3) % len(_WORDS)] for j in range(12)) + f", {i * i}." for i in range(300)]
HARD = [
    "",
    " ",
    "  two  spaces  ",
    "a\n\n\tb\r\n",
    "caf\u00e9 \u6f22\u5b57 \U0001f642 \u00df",
    "a piece spelt <0x0A>",
    "x" * 500,
    "</s> in a text <s>",
    "nul \0 inside",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 460 ids, trained on sentences of made-up words."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text("\n".join(LEARNED), encoding="utf-8")
    return train_tokenizer([folder / "text.txt"], folder / "tok", vocab_size=460, kind=request.param).path


def _sentencepiece(trained: Path, tmp_path: Path) -> Tokenizer:
    """The same directory without its tokenizer.json."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return load_tokenizer(tmp_path)


def _texts(shared_data: Callable[[str], Path]) -> Iterator[str]:
    yield from HARD
    yield from LEARNED[:20]
    yield "the old mason set two stones upright; 1,728 sacks (or more?) in 'the' \"mill\""
    text = shared_data("pretrain/gutenberg/botchan.txt").read_text("utf-8-sig")
    yield from (text[i : i + 1000] for i in range(0, 60_000, 1000))


def test_special_tokens(trained: Path) -> None:
    """<unk>, <s>, </s>, <pad> are ids 0 to 3; a text ends with </s>, and nothing is added to one."""
    tokenizer = load_tokenizer(trained)

    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (460, 1, (2,))
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.encode("a b", add_special_tokens=True) == tokenizer.encode("a b", add_special_tokens=False)


def test_text_survives(trained: Path, shared_data: Callable[[str], Path]) -> None:
    """
    Decoding gives the text, seen in training or not: spaces, line ends, other scripts, bytes.

    But behind a special token that a text spells, a space is added, as in Llama's tokenizers.
    """
    tokenizer = load_tokenizer(trained)
    for text in _texts(shared_data):
        if "</s>" not in text:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_both_files_are_one_tokenizer(trained: Path, tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """
    tokenizer.json gives the ids that SentencePiece gives with tokenizer.model.

    Inverse seen: merges in the order of the ids of their left parts; byte pieces with the score 0 of their file.
    """
    ours, theirs = load_tokenizer(trained), _sentencepiece(trained, tmp_path)
    for text in _texts(shared_data):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text


def test_transformers_loads_it(trained: Path, shared_data: Callable[[str], Path]) -> None:
    """The directory as it stands, with the same ids and special tokens."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    ours = load_tokenizer(trained)

    assert len(theirs) == 460
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2, 3)
    for text in _texts(shared_data):
        assert theirs.encode(text) == ours.encode(text, add_special_tokens=True)
    assert theirs.decode(theirs.encode("old mason's 42 \u00e9")) == "old mason's 42 \u00e9"


def test_training_is_repeatable(trained: Path, tmp_path: Path) -> None:
    """The same texts give the same vocabulary, byte for byte."""
    text = trained.parent / "text.txt"
    kind = "unigram" if "unigram" in trained.parent.name else "bpe"
    again = train_tokenizer([text], tmp_path / "again", vocab_size=460, kind=kind)  # type: ignore[arg-type]

    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (again.path / name).read_bytes() == (trained / name).read_bytes()


def test_R11_vocabularies_that_cannot_be(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """Too small for its bytes, too large or too small for the texts; each says the bound, and nothing is written."""
    rows = write_rows("rows.jsonl", ["one little text", "\u0391\u0392\u0393\u0394 in Greek"])

    with pytest.raises(DataError, match=f"vocab_size must be at least {MIN_VOCAB_SIZE}: .*Given: 300"):
        train_tokenizer([rows], tmp_path / "tok", vocab_size=300)
    with pytest.raises(DataError, match=r"vocab_size must be at most \d+ for these texts\. Given: 9000"):
        train_tokenizer([rows], tmp_path / "tok", vocab_size=9000)
    with pytest.raises(DataError, match=r"at least \d+ for the characters of these texts\. Given: 356"):
        train_tokenizer([rows], tmp_path / "tok", vocab_size=356)
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl"]


def test_R11_wrong_inputs_are_explained(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """Bad rows are listed as `prepare` lists them; a directory that exists is kept; no text is no vocabulary."""
    good, bad, empty = (
        write_rows("good.jsonl", ["text"]),
        write_rows("bad.jsonl", [b"{}", b"[]"]),
        write_rows("empty.jsonl", [""]),
    )

    with pytest.raises(DataError, match=r"bad\.jsonl:1 must have the field 'text'. Given: the fields none"):
        train_tokenizer([good, bad], tmp_path / "tok", vocab_size=400)
    with pytest.raises(DataError, match="at least one document with text"):
        train_tokenizer([empty], tmp_path / "tok", vocab_size=400)
    (tmp_path / "tok").mkdir()
    with pytest.raises(DataError, match="tok exists already"):
        train_tokenizer([good], tmp_path / "tok", vocab_size=400)
