"""What megatron-core's own code makes of token files; run in a process of its own, since it prints and warns a lot."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core.datasets import helpers_cpp  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402


class _Tokenizer:
    """As much of a tokenizer as the dataset asks for."""

    eod = 0
    vocab_size = 100
    unique_identifiers = {"class": "none"}  # noqa: RUF012


def read(prefix: str) -> list[list[int]]:
    """Every sequence of a file."""
    dataset = IndexedDataset(prefix, mmap=True)
    return [dataset[i].tolist() for i in range(len(dataset))]


def write(prefix: str, documents: list[list[list[int]]], vocab_size: int) -> list[str]:
    """Write documents of sequences; digests of both files."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return [hashlib.sha256(Path(f"{prefix}.{suffix}").read_bytes()).hexdigest() for suffix in ("bin", "idx")]


def samples(prefix: str, documents: list[int], seq_len: int, num_samples: int, seed: int) -> list[list[int]]:
    """Tokens, labels, loss mask and positions of every sample, one row each."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=f"{prefix}-cache",
        tokenizer=_Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
    )
    indexed = IndexedDataset(prefix, mmap=True)
    dataset = GPTDataset(indexed, prefix, np.arange(*documents, dtype=np.int32), num_samples, Split.train, config)
    rows = [dataset[i] for i in range(len(dataset))]
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return [[int(value) for name in names for value in row[name]] for row in rows]


def blend(weights: list[float], size: int) -> list[list[int]]:
    """The source of each sample, and its number there."""
    sources, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    shares = np.array(weights) / np.sum(weights)
    helpers_cpp.build_blending_indices(sources, numbers, shares, len(weights), size, False)
    return [sources.tolist(), numbers.tolist()]


def blend_exhaustively(sizes: list[int]) -> list[int]:
    """The source of each sample until all are spent."""
    total = sum(sizes)
    sources, numbers = np.zeros(total, np.int16), np.zeros(total, np.int64)
    helpers_cpp.build_exhaustive_blending_indices(sources, numbers, np.array(sizes, np.int64), len(sizes))
    return sources.tolist()


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    functions = {f.__name__: f for f in (read, write, samples, blend, blend_exhaustively)}
    answer = [functions[name](*arguments) for name, *arguments in request]
    Path(sys.argv[1]).write_text(json.dumps(answer))
