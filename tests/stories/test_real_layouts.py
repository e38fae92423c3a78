"""Stories of the real model by every layout; slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server, serving

FIRST = "Mia had a little white cat."


def tell(server: Server, seed: int) -> dict[str, Any]:
    """A story with a controlled sentence."""
    body = {"first_sentence": FIRST, "seed": seed, "sentences": 3, "controls": [{"index": 3, "keywords": ["rain"]}]}
    response = httpx.post(f"{server.url}/v1/stories", json=body, timeout=300)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.slow
def test_acc_C08_smollm2_tells_the_same_by_every_layout(smollm2_dir: Path) -> None:
    """(1,1), (1,2), (2,1), (3,1): the same sentences about the same keywords, with what was read before cached."""
    told = {}
    for tp, pp in ((1, 1), (1, 2), (2, 1), (3, 1)):
        with serving(smollm2_dir, "--dtype", "float32", "--tp", str(tp), "--pp", str(pp)) as server:
            told[tp, pp] = [tell(server, seed) for seed in (3, 4)]

    shown = {
        layout: [[(one["text"], one["keywords"]) for one in story["sentences"]] for story in stories]
        for layout, stories in told.items()
    }
    assert shown[1, 1][0] != shown[1, 1][1]
    assert all(found == shown[1, 1] for found in shown.values())
    assert all(story["usage"]["cached_tokens"] > 0 for stories in told.values() for story in stories)
