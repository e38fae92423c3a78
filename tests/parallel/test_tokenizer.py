"""Tokenizers: text survives, every token's bytes are exact, and ids are those of an independent implementation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bert, tiny_llama

from trilithon_parallel.config import ModelError
from trilithon_parallel.pieces import byte_alphabet
from trilithon_parallel.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from trilithon_parallel.tokenizer import load_tokenizer as load

TRICKY = [
    "",
    " ",
    "\n\n",
    "a  b   c",
    "12345 and 1.5e10",
    "don't we'll I'M",
    "h\u00e9llo \u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\t\tindented\r\n\r\nlines\n",
    "\u00a0no-break\u2003em\u3000ideographic",
    "e\u0301 combining, \u0627\u0644\u0639\u0631\u0628\u064a\u0629, \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u2460\u00bd\u0663 digits that are not 0 to 9",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tiny_llama(tmp_path_factory.mktemp("tiny") / "m"))


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return load(smollm2_dir)


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(i) for i in ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_of_tokens_make_up_any_text(tiny: Tokenizer, text: str) -> None:
    """With all 256 bytes in the vocabulary, the tokens' bytes joined are the text, whatever it is; so is decode."""
    ids = tiny.encode(text, add_special_tokens=False)

    assert text.encode() == joined(tiny, ids)
    assert text == tiny.decode(ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_offsets_cover_the_text_in_order(tiny: Tokenizer, text: str) -> None:
    """Offsets are in characters, never go back and end at the text's end; ids are those of encode."""
    ids, offsets = tiny.encode_with_offsets(text, add_special_tokens=False)

    assert tiny.encode(text, add_special_tokens=False) == ids
    assert all(0 <= begin <= end <= len(text) for begin, end in offsets)
    assert [begin for begin, _ in offsets] == sorted(begin for begin, _ in offsets)
    assert not offsets or offsets[-1][1] == len(text)


@pytest.mark.parametrize("text", TRICKY, ids=[f"{i}" for i in range(len(TRICKY))])
def test_tricky_texts_survive_smollm2(smollm2: Tokenizer, text: str) -> None:
    """Spaces, digits, combining marks and scripts come back from the real tokenizer."""
    ids = smollm2.encode(text, add_special_tokens=True)

    assert text.encode() == joined(smollm2, ids)
    assert text == smollm2.decode(ids, skip_special_tokens=True)


REAL_TEXTS = (
    "pretrain/tinyshakespeare.txt",
    "pretrain/wikitext2_valid.txt",
    "pretrain/wikipedia_en_articles.jsonl",
    "biomed/drugprot_re.jsonl",
    "dialogue/topical_chat_valid_freq.jsonl",
)


@pytest.mark.parametrize("path", REAL_TEXTS)
def test_real_text_survives_smollm2(smollm2: Tokenizer, shared_data: Callable[[str], Path], path: str) -> None:
    """300,000 characters of each kind of text come back byte for byte through tokens, bytes and decode."""
    text = shared_data(path).read_text(encoding="utf-8")[:300_000]

    ids = smollm2.encode(text, add_special_tokens=False)

    assert text.encode() == joined(smollm2, ids)
    assert text == smollm2.decode(ids, skip_special_tokens=False)


class PlainBpe:
    """Byte-level BPE written down again from its definition: cut, map bytes, merge the lowest rank first."""

    def __init__(self, document: dict[str, Any]) -> None:
        import regex

        self.vocabulary: dict[str, int] = document["model"]["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(document["model"]["merges"])}
        self.visible = {byte: character for character, byte in byte_alphabet().items()}
        self.digits = regex.compile(r"\p{N}|[^\p{N}]+")
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.known: dict[str, list[int]] = {}

    def pieces(self, text: str) -> Iterator[str]:
        for part in self.digits.findall(text):
            yield from self.words.findall(part)

    def merge(self, piece: str) -> list[int]:
        symbols = [self.visible[byte] for byte in piece.encode()]
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, 10**9))
            if best not in self.ranks:
                break
            at, merged = 0, []
            while at < len(symbols):
                if tuple(symbols[at : at + 2]) == best:
                    merged.append("".join(best))
                    at += 2
                else:
                    merged.append(symbols[at])
                    at += 1
            symbols = merged
        return [self.vocabulary[symbol] for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self.pieces(text):
            if piece not in self.known:
                self.known[piece] = self.merge(piece)
            ids += self.known[piece]
        return ids


@pytest.mark.parametrize("path", REAL_TEXTS[1:])
def test_smollm2_ids_are_those_of_the_definition(
    smollm2: Tokenizer, smollm2_dir: Path, shared_data: Callable[[str], Path], path: str
) -> None:
    """
    Built from the GGUF's lists, the tokenizer gives the ids of byte-level BPE with single digits, done by hand.

    Inverse: with runs of spaces cut otherwise (without the look-ahead) it was seen to fail.
    """
    oracle = PlainBpe(json.loads((smollm2_dir / "tokenizer.json").read_text()))
    text = shared_data(path).read_text(encoding="utf-8")[:60_000]

    assert oracle.encode(text) == smollm2.encode(text, add_special_tokens=False)


def test_transformers_gives_the_same_ids_and_chat(smollm2: Tokenizer, smollm2_dir: Path) -> None:
    """AutoTokenizer reads the directory, tokenises alike and renders the GGUF's own chat template."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    for text in [*TRICKY, rendered]:
        assert theirs(text)["input_ids"] == smollm2.encode(text, add_special_tokens=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (smollm2.bos_id, smollm2.eos_ids[0])
    assert set(theirs.all_special_ids) == smollm2.special_ids


def test_special_tokens_are_read_skipped_and_kept(smollm2: Tokenizer) -> None:
    """Turn marks in a text are single tokens; decoding leaves them out or writes them, as asked."""
    text = "<|im_start|>user\nHi<|im_end|>\n"

    ids = smollm2.encode(text, add_special_tokens=False)

    assert ids[0] == 1
    assert 2 in ids
    assert text == smollm2.decode(ids, skip_special_tokens=False)
    assert smollm2.decode(ids, skip_special_tokens=True) == "user\nHi\n"
    assert smollm2.token_bytes(2) == b"<|im_end|>"


def test_ids_outside_the_vocabulary_are_refused(tiny: Tokenizer) -> None:
    """Negative ids must not count from the end."""
    for token_id in (-1, tiny.vocab_size):
        with pytest.raises(ValueError, match=f"from 0 to {tiny.vocab_size - 1}. Given: {token_id}"):
            tiny.token_bytes(token_id)


def test_padding_and_truncation_of_the_file_are_switched_off(minilm_dir: Path) -> None:
    """MiniLM's file pads and cuts to 128 tokens, as for its training; serving sees the whole text, and no padding."""
    tokenizer = load(minilm_dir)

    long, short = (tokenizer.encode(text, add_special_tokens=True) for text in ("word " * 300, "Word"))

    assert len(long) == 302
    assert short == [101, 2773, 102]
    assert tokenizer.decode(short, skip_special_tokens=True) == "word"
    assert tokenizer.token_bytes(tokenizer.encode("tokenization", add_special_tokens=False)[1]) == b"ization"


END_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "generation config first": ({"eos_token_id": 0}, {"eos_token_id": [2, 5]}, {}, (2, 5)),
    "config where generation is silent": ({"eos_token_id": 3}, {}, {}, (3,)),
    "the tokenizer's own joins": ({"eos_token_id": 0}, {}, {"eos_token": "<|im_end|>"}, (0, 2)),
    "an object with content": ({}, {}, {"eos_token": {"content": "<|im_end|>"}}, (2,)),
    "none": ({}, {}, {}, ()),
}


@pytest.mark.parametrize("case", END_CASES, ids=list(END_CASES))
def test_end_tokens_come_from_three_files(case: str, tmp_path: Path) -> None:
    """generation_config.json, then config.json, and the tokenizer's own end token besides."""
    model, generation, own, expected = END_CASES[case]
    model_dir = tiny_llama(tmp_path / "m")
    for name, document in (("config", model), ("generation_config", generation), ("tokenizer_config", own)):
        (model_dir / f"{name}.json").write_text(json.dumps(document))

    assert expected == load(model_dir).eos_ids


def test_digest_follows_the_tokenizer_alone(tmp_path: Path) -> None:
    """Equal tokenizer files have equal digests; another vocabulary has another one."""
    first, second = (load(tiny_llama(tmp_path / str(seed), seed=seed)) for seed in (0, 1))

    assert first.digest == second.digest
    assert first.digest != load(tiny_llama(tmp_path / "other", vocab=390)).digest


def sentencepiece_dir(tmp_path: Path, source: Path, **settings: Any) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_text_survives(kind: str, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Real SentencePiece models: text within the alphabet comes back, offsets and ids agree with the library."""
    import sentencepiece

    source = shared_data(f"tokenizer/sp_botchan_{kind}_1000.model")
    tokenizer = load(sentencepiece_dir(tmp_path, source))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source))
    words = shared_data("pretrain/gutenberg/botchan.txt").read_text(encoding="utf-8-sig")[:20_000].split()
    text = " ".join(word for word in words if reference.unk_id() not in reference.EncodeAsIds(word))

    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=True)

    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert [1, *reference.EncodeAsIds(text)] == ids
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert offsets[0] == (0, 0)
    assert text[offsets[5][0] : offsets[5][1]].strip() == tokenizer.token_bytes(ids[5]).decode().strip()
    assert (1, (2,), frozenset({0, 1, 2})) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.special_ids)


def test_sentencepiece_reads_special_tokens_of_templates(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """`</s>` and added tokens in a text are tokens; an added token gets its id and its bytes."""
    added = {"1000": {"content": "<turn>", "special": True}, "1001": {"content": "<turn>>", "special": False}}
    source = shared_data("tokenizer/sp_botchan_bpe_1000.model")
    tokenizer = load(sentencepiece_dir(tmp_path, source, added_tokens_decoder=added, add_eos_token=True))

    ids, offsets = tokenizer.encode_with_offsets("<turn>I am</s><turn>>", add_special_tokens=True)

    assert [ids[0], ids[1], ids[-3], ids[-2], ids[-1]] == [1, 1000, 2, 1001, 2]
    assert offsets[1] == (0, 6)
    assert offsets[-2] == (14, 21)
    assert tokenizer.vocab_size == 1002
    assert tokenizer.token_bytes(1001) == b"<turn>>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "I am<turn>>"


def test_byte_pieces_and_metaspaces_of_converted_files(tmp_path: Path) -> None:
    """A tokenizer.json in SentencePiece's spelling: <0xNN> is a byte and the metaspace a space."""
    import tokenizers
    from tokenizers import decoders, models

    vocabulary = {"<unk>": 0, "\u2581hi": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}, "\u2581": 258}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)

    ids = [1, 2 + 0xF0, 2 + 0x9F, 2 + 0x98, 2 + 0x80, 258]

    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert " hi\U0001f600 ".encode() == joined(tokenizer, ids)
    assert tokenizer.encode("\U0001f600", add_special_tokens=False) == ids[1:5]


BROKEN_POST_PROCESSOR = json.dumps(
    {
        "model": {"type": "WordLevel", "vocab": {"a": 0, "trial": 1}, "unk_token": "a"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[A]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"other": {"id": "[A]", "ids": [7], "tokens": ["[A]"]}},
        },
    }
)
HUGE_ID = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2**31}, "unk_token": "a"}})

BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "none": ({}, "holds no tokenizer"),
    "not JSON": ({"tokenizer.json": "{"}, "is not JSON"),
    "not a tokenizer": ({"tokenizer.json": '{"model": {"type": "Magic"}}'}, "not a tokenizer"),
    "a list": ({"tokenizer.json": "[]"}, "must hold a JSON object"),
    "fault that shows in use": ({"tokenizer.json": BROKEN_POST_PROCESSOR}, "not a tokenizer that"),
    "id outside": ({"tokenizer.json": BROKEN_POST_PROCESSOR.replace('"other"', '"[A]"')}, "must only give ids of its"),
    "ids without end": ({"tokenizer.json": HUGE_ID}, "Given: a vocabulary of"),
    "not SentencePiece": ({"tokenizer.model": "nonsense"}, "is not a SentencePiece model"),
}


@pytest.mark.parametrize("case", BROKEN, ids=list(BROKEN))
def test_R11_broken_tokenizers_are_one_sentence(case: str, tmp_path: Path) -> None:
    """Missing and broken files are named. Inverse: the other tests' directories load."""
    files, words = BROKEN[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path)

    assert caught.value.hint


def test_tokenizer_needs_no_torch(tmp_path: Path) -> None:
    """The front process tokenises without torch or numpy in memory."""
    model_dir = tiny_bert(tmp_path / "m")
    code = (
        "import sys; from pathlib import Path; from trilithon_parallel.tokenizer import load_tokenizer; "
        "load_tokenizer(Path(sys.argv[1])).encode('the stone', add_special_tokens=True); "
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code, str(model_dir)], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
