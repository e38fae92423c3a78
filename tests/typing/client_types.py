"""What type checkers must conclude about the client; run by tests/client/test_package.py, never imported."""

from typing import assert_type

from trilithon import (
    Annotations,
    AsyncClient,
    AsyncStream,
    Classifications,
    Client,
    Completion,
    Completions,
    Delta,
    Entity,
    Message,
    Model,
    Relations,
    Scores,
    SpanAnswers,
    Stream,
)


def plain(client: Client, messages: list[Message], n: int) -> None:
    assert_type(client.generate("a"), Completion)
    assert_type(client.generate([1, 2], temperature=0.0, stop=["a"]), Completion)
    assert_type(client.generate("a", n=2), Completions)
    assert_type(client.generate("a", n=n, stream=False), Completions)
    assert_type(client.generate("a", stream=True), Stream)
    assert_type(client.generate("a", stream=True, n=2), Stream)
    assert_type(client.chat(messages), Completion)
    assert_type(client.chat(messages, n=2, add_generation_prompt=False), Completions)
    assert_type(client.chat([{"role": "user", "content": "hi"}], stream=True), Stream)
    assert_type(client.score([{"context": "a", "continuations": ["b"]}], timeout=1.0), Scores)
    assert_type(client.models.list(), tuple[Model, ...])
    assert_type(client.extract.annotate(["a"]), Annotations)
    assert_type(client.extract.annotate(["a"])[0].entities, tuple[Entity, ...])
    found = Entity(start=0, end=1, type="x")
    assert_type(client.extract.relations("a", pairs=[(found, {"start": 0, "end": 1, "type": "x"})]), Relations)
    assert_type(client.extract.answer("a", ["b"], n_best=2, model="m"), SpanAnswers)
    assert_type(client.extract.classify(["a"]), Classifications)
    for delta in client.generate("a", stream=True):
        assert_type(delta, Delta)
        assert_type(delta.finish_reason, str | None)


async def twin(client: AsyncClient, messages: list[Message]) -> None:
    assert_type(await client.generate("a"), Completion)
    assert_type(await client.generate("a", n=2), Completions)
    assert_type(await client.generate("a", stream=True), AsyncStream)
    assert_type(await client.chat(messages), Completion)
    async for delta in await client.chat(messages, stream=True):
        assert_type(delta, Delta)


def mistakes(client: Client) -> None:
    client.generate("a", temprature=1.0)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    client.generate("a", max_tokens="3")  # type: ignore[call-overload] # pyright: ignore[reportCallIssue, reportArgumentType]
    client.chat("hi")  # type: ignore[arg-type] # pyright: ignore[reportCallIssue, reportArgumentType]
