"""What an encoder is asked when it chooses a conversation's knowledge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trilithon_server import dialogue_knowledge
from trilithon_server.dialogue_requests import Asked, Grounds
from trilithon_server.knowledge.local import Document
from trilithon_server.tasks.dialogue_format import Turn


class Letters:
    """A tokenizer of letters, between 1 and 2."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1, 2]

    def encode_with_literals(self, text: str, spans: Any) -> tuple[list[int], None]:
        return [ord(letter) for letter in text], None


async def test_R7_the_encoder_obeys_the_limits_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Time limit and priority are those of the caller; how the turn is drawn is not the encoder's. It reads the end of a
    text, as much as its window holds, and gets no more texts at once than it may have.
    """
    limits = SimpleNamespace(max_embedding_inputs=2, max_queue_requests=9, max_prompt_chars_per_token=4)
    hello = SimpleNamespace(max_context_tokens=12)
    model = SimpleNamespace(name="encoder", encoder=True, tokenizer=Letters(), ready=lambda: hello)
    seen: list[tuple[list[list[int]], Any]] = []

    async def embed(service: Any, call: Any, name: str, inputs: Any, values: Any) -> Any:
        seen.append(([list(one.ids) for one in inputs], values))
        return None, [SimpleNamespace(values=[1.0, 0.0]) for _ in inputs], None

    async def resolve(name: str, call: Any) -> Any:
        return model

    async def both_of(service: Any, call: Any, one: Any) -> Any:
        return one, one

    monkeypatch.setattr(dialogue_knowledge, "embed", embed)
    monkeypatch.setattr(dialogue_knowledge, "default_encoder", lambda service: model.name)
    monkeypatch.setattr(dialogue_knowledge, "both_of", both_of)
    service: Any = SimpleNamespace(limits=limits, resolve=resolve)
    call: Any = None
    documents = [Document(id="a", text="The mill has two doors today. The sea has none of them.")]
    asked = Asked(
        conversation=[Turn("other", "Where is the sea?")], grounds=Grounds(documents=documents, scorer="dense")
    )
    values = {"time_limit_ms": 900, "priority": 3, "temperature": 0.5, "max_tokens": 7}
    chosen = await dialogue_knowledge.choose(service, call, asked, values)

    assert [how for _, how in seen] == [{"time_limit_ms": 900, "priority": 3}] * 2
    assert [len(inputs) for inputs, _ in seen] == [2, 1]
    assert seen[1][0] == [[1, *map(ord, "s the sea?"), 2]]
    assert len(chosen) == 2
