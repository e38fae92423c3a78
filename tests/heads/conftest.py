"""What the tests of task heads share: models of transformers' own making, beside what they say of one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hub_heads import CLASSES, hub_config_of, said_by
from task_models import ENCODER, HEADS, batches_of

from trilithon_parallel.layout import Layout


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A directory of model directories as transformers writes them: one of each head, and `base`, a bare encoder.

    Beside a head's files, `expected/logits.safetensors` holds its logits of step 0's batch.
    """
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for kind, opened in CLASSES.items():
            model = opened(hub_config_of(ENCODER, HEADS[kind])).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, 0.0, 0.1) if parameter.dim() == 1 else None
            model.save_pretrained(folder / kind)
            (batch,) = batches_of(kind, 0, Layout(micro_batch_size=8), 0)
            with torch.no_grad():
                logits = said_by(model, batch)
            (folder / kind / "expected").mkdir()
            safetensors.torch.save_file({"logits": logits}, folder / kind / "expected" / "logits.safetensors")
        transformers.BertModel(hub_config_of(ENCODER)).save_pretrained(folder / "base")
    return folder
