"""`client.dialogue` against a real server: both protocols, threads and event loops, whole and as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from knowledge.html_pages import ENTITIES, SMALL_BOMBS
from served import Server, serving
from tiny import tiny_llama

from trilithon import (
    AsyncClient,
    Client,
    DialogueTurn,
    Document,
    InvalidArgument,
    Knowledge,
    KnowledgeUsed,
    NotFound,
    ReplyDelta,
    TaskOptions,
    TrilithonError,
)

TALK: list[DialogueTurn] = [{"speaker": "other", "text": "How far is the sea from the old mill?"}]
PAST: list[list[DialogueTurn]] = [
    [{"speaker": "target", "text": "I never leave the mill."}, {"speaker": "other", "text": "Why not?"}]
]
DOCUMENTS: list[Document] = [
    {"id": "coast", "text": "The sea is two days from the old mill. Nobody counts the gulls of the coast today."},
    {"id": "town", "html": "<html><body><p>The town has a market on every Friday of the year.</p></body></html>"},
]
KNOWN: Knowledge = {"documents": DOCUMENTS, "scorer": "bm25", "top_k": 2}
FAR: Document = {
    "id": "hills",
    "text": "Far behind the hills, where shepherds once kept wool and salted butter, travellers still tell strange "
    "stories about lanterns, storms, horses, brides and one forgotten bell.",
}
"""It shares one word with the talk: its score is below what tfidf asks for by itself."""
GREEDY: TaskOptions = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Llama of random weights, on a server that keeps things."""
    model = tiny_llama(tmp_path_factory.mktemp("dialogue") / "model", context=2048)
    store = tmp_path_factory.mktemp("store")
    with serving(model, "--dtype", "float32", "--set", f"server.store={store}") as started:
        yield started


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    """The server by either protocol."""
    return server.url if request.param == "http" else f"grpc://127.0.0.1:{server.grpc_port}"


async def test_E3_replies_are_one_by_every_way(url: str, server: Server) -> None:
    """Whole, as it comes, from a thread and from a loop: the same turn, stood on the same sentences."""
    with Client(url) as client:
        whole = client.dialogue.respond(TALK, references=PAST, knowledge=KNOWN, **GREEDY)
        with client.dialogue.respond(TALK, references=PAST, knowledge=KNOWN, stream=True, **GREEDY) as stream:
            events = list(stream)
    async with AsyncClient(url) as client_of_loop:
        other = await client_of_loop.dialogue.respond(TALK, references=PAST, knowledge=KNOWN, **GREEDY)
        stream_of_loop = await client_of_loop.dialogue.respond(
            TALK, references=PAST, knowledge=KNOWN, stream=True, **GREEDY
        )
        events_of_loop = [event async for event in stream_of_loop]

    assert whole.candidates == other.candidates
    assert whole.text == "".join(event.delta for event in events if isinstance(event, ReplyDelta)) != ""
    assert events == events_of_loop
    assert tuple(event for event in events if isinstance(event, KnowledgeUsed)) == whole.knowledge != ()
    assert stream.result is not None
    assert stream_of_loop.result is not None
    assert stream.result.candidates == stream_of_loop.result.candidates == whole.candidates
    assert whole.knowledge[0].document_id == "coast"
    assert whole.reference_tokens > 0
    assert whole.candidates[0].finish_reason in ("max_tokens", "stop_sequence", "eos_token")


def test_E3_knowledge_scores_are_one_by_both_protocols(server: Server) -> None:
    """
    A sentence has the same score over HTTP and gRPC, to the last bit, and reaches that score; a `min_score` of 0 is no
    unset one. Seen to fail with 0 sent as unset, and with HTTP's scores left in 64 bits.
    """
    told = {}
    for address in (server.url, server.grpc_target):
        with Client(address) as client:

            def chosen(client: Client = client, **options: Any) -> list[tuple[str, float]]:
                known: Knowledge = {"documents": [*DOCUMENTS, FAR], **options}  # type: ignore[typeddict-item]  # as given
                reply = client.dialogue.respond(TALK, knowledge=known, **GREEDY)
                return [(one.document_id, one.score) for one in reply.knowledge]

            unset, zero = chosen(), chosen(min_score=0.0)
            least = min(score for _, score in zero)
            told[address] = (unset, zero, chosen(min_score=least), chosen(min_score=0.1), chosen(scorer="bm25"))

    by_http, by_grpc = told.values()
    assert by_http == by_grpc
    unset, zero, own, higher, by_words = by_http
    assert [name for name, _ in unset] == [name for name, _ in higher] == ["coast"]
    assert [name for name, _ in zero] == ["coast", "hills"]
    assert own == zero
    assert len(by_words) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_E3_R11_a_document_is_text_or_html(url: str, server: Server, stream: bool) -> None:
    """
    One with both is refused alike by both protocols, as the server does it; an empty body beside the other is none.

    Seen to fail over gRPC, where the second body silently took the first one's place.
    """
    both: Document = {"id": "both", "text": "The sea is far.", "html": "<p>The sea is near.</p>"}
    other: Document = {"id": "other", "text": "The sea is far from the old mill.", "html": ""}
    asked = {"conversation": TALK, "knowledge": {"documents": [other, both]}}
    by_server = httpx.post(f"{server.url}/v1/dialogue", json=asked).json()["error"]
    with Client(url) as client:
        with pytest.raises(InvalidArgument) as caught:
            client.dialogue.respond(TALK, knowledge={"documents": [other, both]}, stream=stream)  # type: ignore[call-overload]  # either of the two
        with pytest.raises(InvalidArgument, match=r"`documents\[0\]` must have text or html"):
            client.dialogue.put_knowledge("both", [both])
        with pytest.raises(InvalidArgument, match=r"`documents\[0\]` must have text or html"):
            client.openqa.answer("How far?", documents=[both])
        with pytest.raises(InvalidArgument, match=r"`documents\[0\]` must have text or html"):
            client.retrieval.create_index("both", documents=[both])
        assert client.dialogue.respond(TALK, knowledge={"documents": [other]}, **GREEDY).knowledge != ()

    assert (caught.value.message, caught.value.code, caught.value.param) == (
        by_server["message"],
        by_server["code"],
        by_server["param"],
    )


async def test_what_is_kept(url: str) -> None:
    """Actors and knowledge bases are put, told of, used, and forgotten."""
    with Client(url) as client:
        actor = client.dialogue.put_actor("miller", PAST)
        base = client.dialogue.put_knowledge("coast", DOCUMENTS)
        told = client.dialogue.get_actor("miller"), client.dialogue.get_knowledge("coast")
        reply = client.dialogue.respond(TALK, actor="miller", knowledge={"kb_id": "coast"}, **GREEDY)
        client.dialogue.delete_actor("miller")
        client.dialogue.delete_knowledge("coast")
        with pytest.raises(NotFound) as gone:
            client.dialogue.get_actor("miller")
    async with AsyncClient(url) as twin:
        assert (await twin.dialogue.put_actor("miller", PAST)).turns == actor.turns
        assert (await twin.dialogue.put_knowledge("coast", DOCUMENTS)).sentences == base.sentences
        assert (await twin.dialogue.get_actor("miller")).conversations == 1
        assert (await twin.dialogue.get_knowledge("coast")).documents == 2
        await twin.dialogue.delete_actor("miller")
        await twin.dialogue.delete_knowledge("coast")

    assert told == (actor, base)
    assert (actor.conversations, actor.turns, base.documents) == (1, 2, 2)
    assert reply.reference_tokens > 0
    assert reply.knowledge != ()
    assert gone.value.code == "actor_not_found"


async def test_refusals_come_before_the_first_event(url: str) -> None:
    """A stream is refused as a call is, and a name that no task takes is no request at all."""
    nobody: list[DialogueTurn] = []
    with Client(url) as client:
        for stream in (False, True):
            with pytest.raises(InvalidArgument, match="conversation"):
                client.dialogue.respond(nobody, stream=stream)  # type: ignore[call-overload]  # either of the two
        with pytest.raises(TypeError, match="max_tokens"):
            client.dialogue.respond(TALK, max_token=3)  # type: ignore[call-overload]  # misspelt on purpose
    async with AsyncClient(url) as twin:
        with pytest.raises(InvalidArgument, match="conversation"):
            await twin.dialogue.respond(nobody, stream=True)


def test_R11_nothing_to_know_and_nothing_to_refer_to_is_no_error(url: str) -> None:
    """
    Knowledge that does not go with the conversation, and a list of references with none in it: the turn is that of a
    request without them. Inverse seen: sentences that share no word are used all the same.
    """
    elsewhere: list[Document] = [{"id": "x", "text": "Quarks have colours and flavours, they say."}]
    with Client(url) as client:
        plain = client.dialogue.respond(TALK, **GREEDY)
        unknown = client.dialogue.respond(TALK, knowledge={"documents": elsewhere}, **GREEDY)
        unmet = client.dialogue.respond(TALK, references=[], **GREEDY)

    assert unknown.knowledge == ()
    assert (unmet.reference_tokens, plain.reference_tokens) == (0, 0)
    assert unknown.candidates == unmet.candidates == plain.candidates


def test_R11_ten_thousand_sentences_are_a_page_too(url: str) -> None:
    """
    The first 512 sentences are known, the last of them too, and what stands behind them is not. Inverse seen: a page
    that is read to its end.
    """
    lines = [f"Stone number {n} stands upright in the grass." for n in range(10_000)]
    lines[511] = "The sea is two days from the old mill."
    lines[512] = "From the old mill the sea is far, far away."
    page = f"<html><body>{''.join(f'<p>{line}</p>' for line in lines)}</body></html>"
    with Client(url) as client:
        base = client.dialogue.put_knowledge("stones", [{"id": "html", "html": page}])
        reply = client.dialogue.respond(TALK, knowledge={"kb_id": "stones"}, **GREEDY)
        given = client.dialogue.respond(
            TALK, knowledge={"documents": [{"id": "text", "text": "\n".join(lines)}]}, **GREEDY
        )
        client.dialogue.delete_knowledge("stones")

    assert (base.documents, base.sentences) == (1, 512)
    for told in (reply, given):
        assert [used.text for used in told.knowledge] == [lines[511]]


@pytest.mark.parametrize("name", SMALL_BOMBS)
def test_R11_a_page_that_is_a_bomb_is_its_senders_error(url: str, name: str) -> None:
    """Refused with the document's place, whether it is to be used or to be kept; the next request is answered."""
    html, code = SMALL_BOMBS[name]
    documents: list[Document] = [{"id": "a", "text": "A mill."}, {"id": "b", "html": html}]
    with Client(url) as client:
        with pytest.raises(InvalidArgument) as asked:
            client.dialogue.respond(TALK, knowledge={"documents": documents}, **GREEDY)
        with pytest.raises(InvalidArgument) as kept:
            client.dialogue.put_knowledge("bombs", documents)
        assert client.dialogue.respond(TALK, **GREEDY).text

    assert (asked.value.code, kept.value.code) == (code, code)
    if code != "invalid_value":
        assert "documents[1].html must" in asked.value.message
        assert "documents[1].html must" in kept.value.message
    else:
        assert "must have at most 1048576 bytes in all" in asked.value.message


def test_R11_what_a_page_declares_is_not_expanded(url: str) -> None:
    """A page with entities that stand for each other has its own sentence and no other."""
    with Client(url) as client:
        base = client.dialogue.put_knowledge("entities", [{"id": "a", "html": ENTITIES}])
        reply = client.dialogue.respond(TALK, knowledge={"kb_id": "entities"}, **GREEDY)
        client.dialogue.delete_knowledge("entities")

    assert base.sentences == 1
    assert [used.text for used in reply.knowledge] == ["The mill has stood by the river since 1820."]


@pytest.mark.parametrize(
    ("asked", "code", "field"),
    [
        ({"references": [[]]}, "invalid_value", "references[0]"),
        ({"references": [*PAST, []]}, "invalid_value", "references[1]"),
        ({"references": PAST, "actor": "a"}, "invalid_value", "references"),
        ({"actor": "nobody"}, "actor_not_found", None),
        ({"knowledge": {}}, "missing_parameter", "knowledge.documents"),
        ({"knowledge": {"kb_id": "nothing"}}, "knowledge_not_found", None),
        ({"knowledge": {"documents": DOCUMENTS, "kb_id": "x"}}, "invalid_value", "knowledge.documents"),
        ({"knowledge": {"documents": DOCUMENTS * 2}}, "knowledge_invalid", None),
        (
            {"knowledge": {"documents": [{"id": "a", "text": "x", "html": "y"}]}},
            "missing_parameter",
            "knowledge.documents[0]",
        ),
        ({"knowledge": {"documents": DOCUMENTS, "scorer": "dense"}}, "unsupported_model", None),
        ({"knowledge": {"documents": DOCUMENTS, "top_k": 51}}, "invalid_value", "knowledge.top_k"),
        ({"topic": "Mills"}, "invalid_value", "topic"),
    ],
)
def test_R11_a_refusal_is_the_same_by_either_protocol(
    url: str, asked: dict[str, Any], code: str, field: str | None
) -> None:
    """The same code for the same field, of a call and of a stream."""
    with Client(url) as client:
        for stream in (False, True):
            with pytest.raises(TrilithonError) as refused:
                client.dialogue.respond(TALK, stream=stream, **asked, **GREEDY)
            assert (refused.value.code, refused.value.param) == (code, field)


def test_R11_a_document_of_both_kinds_is_refused_to_keep(url: str) -> None:
    """Neither of the two is kept in the other's place. Inverse seen: the page is kept, and nobody is told."""
    with Client(url) as client, pytest.raises(InvalidArgument, match="text or html") as refused:
        client.dialogue.put_knowledge("both", [{"id": "a", "text": "x", "html": "y"}])

    assert refused.value.code == "missing_parameter"
    assert refused.value.param == "documents[0]"
