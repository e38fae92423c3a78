"""Micro-batches of global sample ids: a blend of token files, cut, shuffled and made into what an objective learns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilithon_parallel.data.blend import BlendIndex, blend, blend_exhaustively
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.index import IndexedTokens
from trilithon_parallel.data.objectives import Objective, Sample
from trilithon_parallel.data.publish import publish_folder
from trilithon_parallel.data.samples import SampleIndex, cached_samples, open_array, split_documents

PARTS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """
    Samples, packed one behind the other into T tokens.

    Attributes:
        tokens, targets, positions: i64[T].
        loss_mask: bool[T], True where the target counts.
        types: i64[T], token types, or None.
        cu_seqlens: where attention begins anew, rising from 0 to T: at each sample, and where the objective says so.
        sample_ids: the global ids of the samples, in order.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    positions: NDArray[np.int64]
    types: NDArray[np.int64] | None
    cu_seqlens: list[int]
    sample_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Seq2SeqMicroBatch(MicroBatch):
    """
    The decoder's side as in `MicroBatch`; the encoder's beside it, sequence by sequence the same samples.

    Attributes:
        encoder_tokens, encoder_positions: i64[Te].
        encoder_cu_seqlens: from 0 to Te, one border per sample.
    """

    encoder_tokens: NDArray[np.int64]
    encoder_positions: NDArray[np.int64]
    encoder_cu_seqlens: list[int]


@dataclass(frozen=True)
class Source:
    """One token file of a blend: its prefix and its weight, of any scale."""

    prefix: Path
    weight: float = 1.0


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from one source."""

    prefix: Path
    documents: int
    tokens: int
    samples: int
    epochs: float


class TrainingData:
    """
    The global stream of samples; any rank asks for any sample ids and gets the same as every other.

    Args:
        sources: token files and their weights.
        objective: what is learned from a window.
        seq_len: tokens of a sample (of its encoder's side where there is one).
        seed: of document order, sample order and masking, from 0 to 2**32 - 1.
        num_samples: length of the stream, over as many epochs as it takes. None: every sample of every source exactly
            once, as an evaluation wants it.
        split, part: shares of the documents of each file, and which of them this stream is of.
        vocab_size: token ids must be below it.
        cache_dir: where orders are kept for the next start and for the other ranks; None builds them in memory.
    Raises:
        DataError: a file is missing or broken, a weight or the split is wrong, a part holds no sample.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        objective: Objective,
        seq_len: int,
        seed: int,
        num_samples: int | None,
        vocab_size: int,
        split: Sequence[float] = (1, 0, 0),
        part: str = "train",
        cache_dir: Path | None = None,
    ) -> None:
        if seq_len < 1 or not 0 <= seed < 2**32 or (num_samples is not None and num_samples < 1):
            raise DataError(
                "training data must have seq_len and num_samples of at least 1 and a seed from 0 to 2**32 - 1. "
                f"Given: seq_len {seq_len}, num_samples {num_samples}, seed {seed}."
            )
        if part not in PARTS or len(split) != len(PARTS):
            raise DataError(
                f"split must have {len(PARTS)} shares, for {', '.join(PARTS)}. Given: {list(split)}, part {part!r}."
            )
        self.objective, self.seq_len, self.seed, self.part = objective, seq_len, seed, part
        self._vocab_size, self._weights = vocab_size, [source.weight for source in sources]
        self._files = [IndexedTokens(source.prefix) for source in sources]
        self._documents = [split_documents(file.num_documents, split)[PARTS.index(part)] for file in self._files]
        windows = objective.windows(seq_len)
        self._samples: list[SampleIndex] = []
        if num_samples is not None:
            self._blend = _cached_blend(cache_dir, self._weights, num_samples)
        for i, (file, documents) in enumerate(zip(self._files, self._documents, strict=True)):
            wanted = None if num_samples is None else self._blend.num_samples(i)
            try:
                found = cached_samples(
                    cache_dir,
                    file.index_digest,
                    file.document_lengths(),
                    documents,
                    windows=windows,
                    seed=seed,
                    num_samples=wanted,
                )
            except DataError as error:
                raise DataError(f"{file.prefix} ({part}): {error.message}", code=error.code, hint=error.hint) from None
            self._samples.append(found)
        if num_samples is None:
            sizes = [len(samples) for samples in self._samples]
            self._blend = BlendIndex.of(blend_exhaustively(sizes), len(sizes))

    @property
    def num_samples(self) -> int:
        """Samples of the stream; ids are below it."""
        return len(self._blend)

    @property
    def digest(self) -> str:
        """
        A name for the stream, in hex: of files, weights, split, objective, lengths, count and seed.

        A cursor means the same samples exactly when this is equal; a resume refuses another.
        """
        parts = {
            "files": [file.digest for file in self._files],
            "documents": [[documents.start, documents.stop] for documents in self._documents],
            "weights": self._weights,
            "objective": [type(self.objective).__name__, asdict(self.objective)],
            "stream": [self.seq_len, self.seed, self.num_samples],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def uses(self) -> list[SourceUse]:
        """What the stream takes from each source, for the log."""
        return [
            SourceUse(
                prefix=file.prefix,
                documents=len(documents),
                tokens=(tokens := int(samples.ends[-1]) // samples.num_epochs),
                samples=self._blend.num_samples(i),
                epochs=self._blend.num_samples(i) * samples.windows.stride / tokens,
            )
            for i, (file, documents, samples) in enumerate(
                zip(self._files, self._documents, self._samples, strict=True)
            )
        ]

    def micro_batch(self, sample_ids: Sequence[int]) -> MicroBatch:
        """
        The samples of these ids, packed; a `Seq2SeqMicroBatch` where the objective has an encoder's side.

        Args:
            sample_ids: at least one, each from 0 to `num_samples` - 1.
        Raises:
            DataError: an id is beyond the stream, or a token is beyond the vocabulary.
        """
        for sample_id in sample_ids:
            if not 0 <= sample_id < self.num_samples:
                raise DataError(
                    f"sample id must be from 0 to {self.num_samples - 1}. Given: {sample_id}.",
                    code="data_exhausted",
                    hint="Open the data with as many samples as the run consumes.",
                )
        samples = [self.sample(sample_id) for sample_id in sample_ids]
        tokens = np.concatenate([sample.tokens for sample in samples])
        offsets = np.cumsum([0, *(len(sample.tokens) for sample in samples)]).tolist()
        types = [sample.types for sample in samples if sample.types is not None]
        decoder = MicroBatch(
            tokens=tokens,
            targets=np.concatenate([sample.targets for sample in samples]),
            loss_mask=np.concatenate([sample.loss_mask for sample in samples]),
            positions=np.concatenate([sample.positions for sample in samples]),
            types=np.concatenate(types) if types else None,
            cu_seqlens=[
                offset + start for offset, sample in zip(offsets, samples, strict=False) for start in sample.starts
            ]
            + [len(tokens)],
            sample_ids=tuple(sample_ids),
        )
        encoders = [sample.encoder_tokens for sample in samples if sample.encoder_tokens is not None]
        if not encoders:
            return decoder
        return Seq2SeqMicroBatch(
            **vars(decoder),
            encoder_tokens=np.concatenate(encoders),
            encoder_positions=np.concatenate([np.arange(len(tokens), dtype=np.int64) for tokens in encoders]),
            encoder_cu_seqlens=np.cumsum([0, *map(len, encoders)]).tolist(),
        )

    def sample(self, sample_id: int) -> Sample:
        """One sample of the stream."""
        source, number = self._blend.locate(sample_id)
        file = self._files[source]
        pieces = self._samples[source].pieces(number)
        window = np.concatenate([file.read(p.document, p.start, p.stop) for p in pieces]).astype(np.int64)
        if window.min() < 0 or window.max() >= self._vocab_size:
            raise DataError(
                f"{file.prefix} documents {', '.join(str(p.document) for p in pieces[:5])}: token ids must be from 0 "
                f"to {self._vocab_size - 1}. Given: {window.min()} to {window.max()}.",
                code="data_vocabulary",
                hint="Prepare the data with the tokenizer of the model.",
            )
        ends = np.cumsum([p.stop - p.start for p in pieces])
        starts = [int(end) for end, piece in zip(ends, pieces[1:], strict=False) if piece.start == 0]
        return self.objective.build(window, starts, sample_id=sample_id, seed=self.seed)


def _cached_blend(cache_dir: Path | None, weights: Sequence[float], num_samples: int) -> BlendIndex:
    """The blend's order, kept like the sample orders: a long one takes minutes."""
    if cache_dir is None or len(weights) == 1:
        return BlendIndex.of(blend(weights, num_samples), len(weights))
    key = hashlib.sha256(json.dumps([1, list(weights), num_samples]).encode()).hexdigest()[:32]
    folder = cache_dir / f"blend-{key}"
    if not folder.is_dir():
        order = blend(weights, num_samples)
        publish_folder(folder, lambda aside: np.save(aside / "sources.npy", order, allow_pickle=False))
    sources = open_array(folder / "sources.npy")
    if sources.dtype != np.uint8 or len(sources) != num_samples or (num_samples and sources.max() >= len(weights)):
        raise DataError(
            f"{folder} must hold the source of {num_samples} samples. Given: {len(sources)} of {sources.dtype}.",
            code="data_cache",
            hint="Delete this folder; it is built again.",
        )
    return BlendIndex.of(sources, len(weights))
