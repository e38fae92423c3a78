"""Training data: what a micro-batch holds, and that the stream has one name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilithon_parallel.data.batches import MicroBatch, Seq2SeqMicroBatch, Source, TrainingData
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.index import IndexedTokens
from trilithon_parallel.data.index_writer import IndexWriter
from trilithon_parallel.data.objectives import CausalLM, MaskedLM, SpanCorruption

RESETTING = CausalLM(reset_positions=True, reset_attention=True, mask_document_ends=True)
MASKED = MaskedLM(vocab_size=100, cls_id=97, sep_id=98, mask_id=99, pairs=True)
SPANS = SpanCorruption(sentinel_ids=tuple(range(80, 97)), eos_id=97, pad_id=98)


def open_data(*prefixes: Path, **changes: Any) -> TrainingData:
    """A stream of 60 samples of 16 tokens, weights 1, 2, ..."""
    options: dict[str, Any] = {
        "objective": CausalLM(),
        "seq_len": 16,
        "seed": 3,
        "num_samples": 60,
        "vocab_size": 100,
    }
    sources = [Source(prefix, 1.0 + i) for i, prefix in enumerate(prefixes)]
    return TrainingData(sources, **options | changes)


def test_causal_micro_batch(write_tokens: Callable[..., Path]) -> None:
    """Samples lie one behind the other, with a border at each; arrays are whole numbers of 64 bits."""
    data = open_data(write_tokens())
    batch = data.micro_batch([4, 5, 9])

    assert type(batch) is MicroBatch
    assert batch.cu_seqlens == [0, 16, 32, 48]
    assert batch.sample_ids == (4, 5, 9)
    for array in (batch.tokens, batch.targets, batch.positions):
        assert (array.dtype, array.shape) == (np.int64, (48,))
    assert batch.loss_mask.all()
    assert batch.types is None
    assert np.array_equal(batch.tokens[16:32], data.micro_batch([5]).tokens)
    for row in range(3):
        assert np.array_equal(batch.tokens[row * 16 + 1 : row * 16 + 16], batch.targets[row * 16 : row * 16 + 15])


def test_borders_at_documents(write_tokens: Callable[..., Path]) -> None:
    """
    With resets, attention and positions begin anew behind each end of document, and it predicts nothing.

    The end of document is token 0 in these files and nothing else; the borders come from the index.
    """
    batch = open_data(write_tokens(), objective=RESETTING).micro_batch(range(20))
    rows = batch.tokens.reshape(20, 16)

    expected = [row * 16 + place for row in range(20) for place in range(16) if place == 0 or rows[row, place - 1] == 0]
    assert batch.cu_seqlens == [*expected, 320]
    assert np.array_equal(~batch.loss_mask, batch.tokens == 0)
    assert sorted(np.flatnonzero(batch.positions == 0)) == expected
    assert len(expected) > 25


def test_masked_micro_batch(write_tokens: Callable[..., Path]) -> None:
    """Masked-LM samples have token types, and one border each."""
    batch = open_data(write_tokens(), objective=MASKED, vocab_size=100).micro_batch([0, 1])

    assert batch.types is not None
    assert batch.types.shape == batch.tokens.shape == (32,)
    assert batch.cu_seqlens == [0, 16, 32]
    assert 2 <= batch.loss_mask.sum() <= 6


def test_seq2seq_micro_batch(write_tokens: Callable[..., Path]) -> None:
    """Encoder's and decoder's sides have their own borders, and as many samples."""
    batch = open_data(write_tokens(), objective=SPANS).micro_batch([7, 2])

    assert isinstance(batch, Seq2SeqMicroBatch)
    assert batch.encoder_cu_seqlens == [0, 16, 32]
    assert batch.encoder_positions.tolist() == [*range(16), *range(16)]
    assert len(batch.encoder_tokens) == 32
    assert batch.cu_seqlens == [0, 8, 16]


@pytest.mark.parametrize("objective", [RESETTING, MASKED, SPANS], ids=["causal", "masked", "spans"])
def test_a_sample_is_the_same_in_any_batch(objective: Any, write_tokens: Callable[..., Path]) -> None:
    """What a sample holds does not depend on its neighbours, nor on who asks, nor on a cache."""
    prefix = write_tokens()
    data, other = open_data(prefix, objective=objective), open_data(prefix, objective=objective)
    together = data.micro_batch([3, 8])

    alone = other.micro_batch([8])
    assert np.array_equal(together.tokens[len(together.tokens) - len(alone.tokens) :], alone.tokens)
    assert np.array_equal(together.targets[len(together.targets) - len(alone.targets) :], alone.targets)


def test_blend_and_epochs(write_tokens: Callable[..., Path]) -> None:
    """Sources are taken by weight, and a run knows how often it reads each."""
    data = open_data(write_tokens("a", seed=1), write_tokens("b", seed=2, num_documents=4))
    first, second = data.uses()

    assert (first.samples, second.samples) == (20, 40)
    assert first.documents == 40
    assert first.epochs == pytest.approx(20 * 16 / first.tokens)
    assert second.epochs > 3


def test_held_out_documents_are_others(write_tokens: Callable[..., Path]) -> None:
    """
    Training and validation have no document in common, and the validation stream reads each sample once.

    Inverse seen: ignoring `part` gives both the same tokens.
    """
    prefix = write_tokens(num_documents=50)
    tokens = IndexedTokens(prefix)
    split = (80, 20, 0)
    train = open_data(prefix, split=split, num_samples=200)
    valid = open_data(prefix, split=split, part="valid", num_samples=None)

    def documents(data: TrainingData) -> set[int]:
        return {piece.document for samples in data._samples for i in range(len(samples)) for piece in samples.pieces(i)}

    assert documents(train) == set(range(40))
    assert documents(valid) <= set(range(40, 50))
    held_out = sum(len(tokens.read(i)) for i in range(40, 50))
    assert valid.num_samples == (held_out - 1) // 16


def test_digest_names_the_stream(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    """The digest changes with everything that changes a sample, and with nothing else."""
    prefix = write_tokens()
    same = open_data(prefix, cache_dir=tmp_path / "cache")
    changes: list[dict[str, Any]] = [
        {"seed": 4},
        {"num_samples": 61},
        {"seq_len": 8},
        {"objective": RESETTING},
        {"split": (90, 10, 0)},
    ]
    digests = [open_data(prefix, **change).digest for change in changes]
    other = write_tokens("other", seed=9)
    digests += [open_data(other).digest, open_data(prefix, other).digest, open_data(other, prefix).digest]

    assert open_data(prefix).digest == same.digest
    assert len({same.digest, *digests}) == 9
    sources = [Source(prefix, 2), Source(other, 2)]
    even = TrainingData(sources, objective=CausalLM(), seq_len=16, seed=3, num_samples=60, vocab_size=100)
    assert even.digest not in digests


def test_streams_do_not_depend_on_the_process(write_tokens: Callable[..., Path]) -> None:
    """Another process, with another hash seed, has the same samples: nothing follows the order of a set."""
    prefix = write_tokens()
    code = (
        "import sys; from pathlib import Path\n"
        "from trilithon_parallel.data.batches import *; from trilithon_parallel.data.objectives import *\n"
        "data = TrainingData([Source(Path(sys.argv[1]))], objective=CausalLM(), seq_len=16, seed=3, num_samples=60,"
        " vocab_size=100)\n"
        "print(data.micro_batch(range(60)).tokens.tolist(), data.digest)"
    )
    environment = {"PYTHONHASHSEED": "77", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code, str(prefix)], env=environment, capture_output=True, check=True)

    data = open_data(prefix)
    assert done.stdout.decode().strip() == f"{data.micro_batch(range(60)).tokens.tolist()} {data.digest}"


def test_no_torch() -> None:
    """The data rooms import no torch, and no tokenizer library where only numbers are needed."""
    rooms = "batches blend cursor documents errors index index_writer objectives prepare publish ramp samples"
    code = "import sys, importlib\n" + "".join(
        f"importlib.import_module('trilithon_parallel.data.{room}')\n" for room in [*rooms.split(), "train_tokenizer"]
    )

    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seq_len": 0}, "seq_len and num_samples of at least 1"),
        ({"num_samples": 0}, "Given: seq_len 16, num_samples 0, seed 3"),
        ({"seed": 2**32}, "a seed from 0 to 2**32 - 1"),
        ({"part": "dev"}, "split must have 3 shares, for train, valid, test. Given: [1, 0, 0], part 'dev'"),
        ({"split": (98, 2)}, "Given: [98, 2]"),
        ({"part": "test"}, "corpus (test): documents [40, 40) must hold a sample of 17 tokens. Given: 0 tokens"),
        ({"part": "valid", "split": (39, 1, 0), "num_samples": None, "seq_len": 64}, "corpus (valid): documents [39"),
    ],
    ids=str,
)
def test_R11_wrong_options_are_explained(
    changes: dict[str, Any], sentence: str, write_tokens: Callable[..., Path]
) -> None:
    """Each says what it must be and what was given, and which file it is about."""
    with pytest.raises(DataError) as raised:
        open_data(write_tokens(), **changes)

    assert sentence in raised.value.message


def test_R11_ids_beyond_the_stream_or_the_vocabulary(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    """A sample that does not exist, and a token that the model has no row for, are refused by name."""
    with pytest.raises(DataError, match=r"sample id must be from 0 to 59\. Given: 60"):
        open_data(write_tokens()).micro_batch([60])
    with IndexWriter(tmp_path / "big", dtype=np.dtype("<u2")) as writer:
        writer.add_document([*range(40), 100])
        writer.publish()

    data = open_data(tmp_path / "big")
    with pytest.raises(DataError, match=r"big documents 0.*: token ids must be from 0 to 99\. Given: .* to 100"):
        data.micro_batch(range(5))
