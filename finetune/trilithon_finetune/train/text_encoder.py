"""An encoder of this process, for labels that are vectors' work: the engine that serves it, one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trilithon_finetune.data.story_labels import TextEncoder
from trilithon_parallel.config import load_config
from trilithon_server.engine.identity import model_digest
from trilithon_server.llm import LLM

MAX_TEXTS = 256
"""Given to the engine at once."""


@contextmanager
def open_encoder(model_dir: Path) -> Iterator[TextEncoder]:
    """
    Load an encoder; it is let go of when the block ends.

    Raises:
        ModelError: the directory holds none that can be served here.
    """
    config = load_config(model_dir)
    kind = "FIRST" if config.pooling == "cls" else "MEAN"
    with LLM(model_dir, dtype="float32") as llm:

        def vectors(sequences: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
            rows: list[list[float]] = []
            for first in range(0, len(sequences), MAX_TEXTS):
                rows += llm.embed(sequences[first : first + MAX_TEXTS], kind=kind, normalize=config.normalize)
            return np.array(rows, np.float32).reshape(len(sequences), config.hidden_size)

        yield TextEncoder(llm.tokenizer, vectors, model_digest(model_dir))
