"""
Against megatron-core itself: its files, its order of samples, its blends.

It is no dependency. To run these, unpack it where TRILITHON_MEGATRON points, without its own dependencies:
`pip install --no-deps --target DIR megatron-core==0.16.1`. Checked with that version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilithon_parallel.data.batches import Source, TrainingData
from trilithon_parallel.data.blend import MT_NLG_BLEND, BlendIndex, blend, blend_exhaustively
from trilithon_parallel.data.index import IndexedTokens, token_dtype
from trilithon_parallel.data.index_writer import IndexWriter
from trilithon_parallel.data.objectives import CausalLM

PEER = Path(__file__).with_name("megatron_peer.py")
FOLDER = os.environ.get("TRILITHON_MEGATRON", "")
SEQ_LEN, SEED = 23, 1234
COUNTS = (1, 40, 46, 55, 83, 200)
"""An epoch has 45 samples: within it, a last epoch shuffled apart (46, 55, 200), one that is not (83)."""

DOCUMENTS = {vocab: [[[1, 2, 3], [4]], [[5, 6]], [[vocab - 1]]] for vocab in (100, 70_000)}
BLENDS = {
    "three": (0.5, 0.3, 0.2),
    "ties": (1, 1, 1, 1),
    "nine": (3, 1, 2, 7, 1, 1, 5, 2, 9),
    "MT-NLG": tuple(source.weight for source in MT_NLG_BLEND),
}
SIZES = (7, 3, 12, 3)

pytestmark = pytest.mark.skipif(
    not FOLDER and importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed; TRILITHON_MEGATRON names a folder that holds it",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of ours: `ours-<vocab>` with documents of several sequences, `corpus` to cut samples from."""
    path = tmp_path_factory.mktemp("peer")
    for vocab, documents in DOCUMENTS.items():
        with IndexWriter(path / f"ours-{vocab}", dtype=token_dtype(vocab)) as writer:
            for document in documents:
                for sequence in document:
                    writer.add_sequence(sequence)
                writer.end_document()
            writer.publish()
    random = np.random.RandomState(5)
    with IndexWriter(path / "corpus", dtype=token_dtype(100)) as writer:
        for _ in range(50):
            writer.add_document([*random.randint(1, 100, random.randint(1, 40)), 0])
        writer.publish()
    return path


@pytest.fixture(scope="module")
def peer(folder: Path) -> dict[str, Any]:
    """What megatron-core answers, by question; it starts once, in six seconds."""
    calls: dict[str, tuple[Any, ...]] = {
        **{f"read {vocab}": ("read", str(folder / f"ours-{vocab}")) for vocab in DOCUMENTS},
        **{f"write {v}": ("write", str(folder / f"theirs-{v}"), documents, v) for v, documents in DOCUMENTS.items()},
        **{f"samples {n}": ("samples", str(folder / "corpus"), [0, 49], SEQ_LEN, n, SEED) for n in COUNTS},
        **{f"blend {name}": ("blend", weights, 5000) for name, weights in BLENDS.items()},
        "exhaustive": ("blend_exhaustively", SIZES),
    }
    path = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH", "")]))
    answer = folder / "answer.json"
    done = subprocess.run(
        [sys.executable, str(PEER), str(answer)],
        input=json.dumps(list(calls.values())).encode(),
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(calls, json.loads(answer.read_text()), strict=True))


@pytest.mark.parametrize("vocab", DOCUMENTS)
def test_files_are_those_of_megatron(vocab: int, folder: Path, peer: dict[str, Any]) -> None:
    """Files that we write are read there with the same tokens, and are byte for byte those that it writes itself."""
    sequences = [sequence for document in DOCUMENTS[vocab] for sequence in document]
    ours = [hashlib.sha256((folder / f"ours-{vocab}.{s}").read_bytes()).hexdigest() for s in ("bin", "idx")]

    assert peer[f"read {vocab}"] == sequences
    assert peer[f"write {vocab}"] == ours
    reread = IndexedTokens(folder / f"theirs-{vocab}")
    assert [reread.sequence(i).tolist() for i in range(reread.num_sequences)] == sequences
    assert [reread.read(i).tolist() for i in range(reread.num_documents)] == [
        [*itertools.chain(*d)] for d in DOCUMENTS[vocab]
    ]


@pytest.mark.parametrize("num_samples", COUNTS)
def test_samples_come_in_the_order_of_megatron(num_samples: int, folder: Path, peer: dict[str, Any]) -> None:
    """
    Tokens, labels, loss mask and positions of every sample are those of its GPT dataset.

    Inverse seen: a threshold of 0.9 for the last epoch, and a shuffle of the samples before that of the documents.
    """
    data = TrainingData(
        [Source(folder / "corpus")],
        objective=CausalLM(reset_positions=True, mask_document_ends=True),
        seq_len=SEQ_LEN,
        seed=SEED,
        num_samples=num_samples,
        vocab_size=100,
        split=(49, 1, 0),
    )
    batches = [data.micro_batch([i]) for i in range(num_samples)]

    actual = [[*b.tokens, *b.targets, *b.loss_mask.astype(int), *b.positions] for b in batches]
    assert np.array_equal(actual, peer[f"samples {num_samples}"][:num_samples])


@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_those_of_megatron(name: str, peer: dict[str, Any]) -> None:
    """Source and number of each sample agree, ties included."""
    index = BlendIndex.of(blend(BLENDS[name], 5000), len(BLENDS[name]))

    assert [index.locate(k) for k in range(5000)] == list(map(tuple, zip(*peer[f"blend {name}"], strict=True)))


def test_exhaustive_blends_are_those_of_megatron(peer: dict[str, Any]) -> None:
    """A spent source drops out at the same sample."""
    assert blend_exhaustively(SIZES).tolist() == peer["exhaustive"]
