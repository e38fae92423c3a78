"""Stories of the real model by every layout; slow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server, serving

FIRST = "Mia had a little white cat."


def tell(server: Server, seed: int) -> dict[str, Any]:
    """A story with a controlled sentence."""
    body = {
        "model": "writer", "first_sentence": FIRST, "seed": seed, "sentences": 3,
        "controls": [{"index": 3, "keywords": ["rain"]}],
    }  # fmt: skip
    response = httpx.post(f"{server.url}/v1/stories", json=body, timeout=600)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def shown(story: dict[str, Any]) -> list[tuple[str, list[str], list[str]]]:
    """What is told of each sentence."""
    return [(one["text"], one["keywords"], [fact["text"] for fact in one["facts"]]) for one in story["sentences"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_acc_C08_smollm2_tells_the_same_by_every_layout(
    smollm2_dir: Path, minilm_dir: Path, shared_data: Callable[[str], Path]
) -> None:
    """
    (1,1), (1,2), (2,1), (3,1), alone and beside another story: the same sentences about the same keywords with the same
    facts of a real graph, with what was read before cached.
    """
    told = {}
    for tp, pp in ((1, 1), (1, 2), (2, 1), (3, 1)):
        values: dict[str, Any] = {
            "engines.0.served_name": "writer", "engines.1.name": "encoder", "engines.1.model": minilm_dir,
            "engines.1.num_threads": 1, "engines.1.dtype": "float32", "engines.1.memory_fraction": 0.1,
            "engines.1.tp": tp, "engines.1.pp": pp, "server.concepts": shared_data("kb/conceptnet100k_train.tsv"),
        }  # fmt: skip
        flags = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
        with (
            serving(smollm2_dir, "--dtype", "float32", "--tp", str(tp), "--pp", str(pp), *flags) as server,
            ThreadPoolExecutor(2) as pool,
        ):
            told[tp, pp] = [tell(server, 3), *pool.map(lambda seed, at=server: tell(at, seed), (3, 4))]  # type: ignore[misc]

    alone, beside, other = map(shown, told[1, 1])
    assert alone == beside != other
    assert any(facts for _, _, facts in alone)
    for stories in told.values():
        assert [shown(story) for story in stories] == [alone, beside, other]
        assert all(story["usage"]["cached_tokens"] > 0 for story in stories)
