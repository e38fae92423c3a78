"""Replies by prompting alone: what is read in both steps, which examples are taken, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from served import Server, serving
from tiny import tiny_llama

from trilithon import Client
from trilithon.api.v1 import common_pb2, dialogue_pb2, dialogue_pb2_grpc
from trilithon_parallel.config import ModelError
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks import TASK_FILE, read_task
from trilithon_server.tasks.dialogue_format import DialogueFormat, NoRoomError, Turn
from trilithon_server.tasks.msdp_format import MsdpFormat

EXAMPLES: list[dict[str, Any]] = [
    {
        "topic": "Tea",
        "turns": ["I like tea.", "When did tea come to Europe?"],
        "knowledge": "The first tea came to Europe in 1610.",
        "reply": "In 1610, they say.",
    },
    {"topic": "Mills", "turns": ["Who turns the mills?"], "knowledge": "A wheel in the river turns the mills."},
    {"topic": "Gulls", "turns": ["Do gulls sleep?"], "knowledge": "Gulls sleep on water.", "reply": "On water,\nyes."},
    {"topic": "Tea", "turns": ["Who grows tea?"], "knowledge": "Tea is grown in Assam.", "reply": "Assam does."},
]
TASK = {
    "task": "dialogue",
    "msdp": True,
    "examples": "examples.jsonl",
    "knowledge_examples": 2,
    "reply_examples": 2,
    "knowledge_tokens": 8,
}
TALK = [
    {"speaker": "target", "text": "I drink tea all day."},
    {"speaker": "other", "text": "And when did  tea\ncome to the mills?"},
]
TURNS = [Turn("target", TALK[0]["text"]), Turn("other", TALK[1]["text"])]
GREEDY = {"temperature": 0, "max_tokens": 12}
DOCUMENTS = [{"id": "mills", "text": "Tea came to the mills with the railway in 1851."}]

FIRST_STEP = (
    "( Who turns the mills? ) Mills => A wheel in the river turns the mills. \n"
    "( When did tea come to Europe? ) Tea => The first tea came to Europe in 1610. \n"
    "( And when did tea come to the mills? ) Tea mills =>"
)
SECOND_STEP = (
    "Topic: Tea. User says: When did tea come to Europe? We know that: The first tea came to Europe in 1610. "
    "System replies: In 1610, they say. \n"
    "Topic: Gulls. User says: Do gulls sleep? We know that: Gulls sleep on water. System replies: On water, yes. \n"
    "Topic: Tea mills. User says: And when did tea come to the mills? We know that: {knowledge} System replies:"
)


def write_task(directory: Path, *, rows: list[Any] = EXAMPLES, **changed: Any) -> Path:
    """A task file with its examples."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (directory / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / TASK_FILE).write_text(json.dumps({**TASK, **changed}), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, prompted by the examples."""
    return write_task(tiny_llama(tmp_path_factory.mktemp("msdp") / "model", context=2048))


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    """It serves that model."""
    with serving(model_dir, "--dtype", "float32") as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    """Of that model."""
    return load_tokenizer(model_dir)


@pytest.fixture(scope="module")
def format_(model_dir: Path) -> MsdpFormat:
    """As its task file says."""
    found = read_task(model_dir)
    assert isinstance(found, MsdpFormat)
    return found


def text_of(tokens: Any, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


# -- prompts ----------------------------------------------------------------------------------------------------


def test_the_prompts_are_those_of_the_paper(format_: MsdpFormat, tokenizer: Tokenizer) -> None:
    """
    Two examples like the conversation, the most similar one last; then the fixed ones, each text in one line.

    Inverse seen: with the most similar example first the first prompt differs.
    """
    asked = format_.ask("Tea mills", TURNS, tokenizer, room=2000)
    packed = format_.pack("Tea mills", TURNS, tokenizer, knowledge=["By rail.", "In 1851."], room=2000)

    assert text_of(asked, tokenizer) == FIRST_STEP
    assert text_of(packed.tokens, tokenizer) == SECOND_STEP.format(knowledge="By rail. In 1851.")
    assert (packed.references, packed.dropped.conversation, packed.knowledge) == (0, 1, (0, 1))


def test_the_topic_and_the_last_three_turns_choose(format_: MsdpFormat) -> None:
    """Any of them may name what an example is of; a turn before them counts for nothing, and of equals the first."""
    gulls, mills = EXAMPLES[2], EXAMPLES[1]
    no = Turn("other", "Hm.")

    def best(topic: str, *turns: Turn) -> str:
        return format_.similar(topic, turns)[-1].topic

    assert best("Gulls", no) == gulls["topic"]
    assert best("Birds", Turn("other", "Do gulls sleep?"), no, no) == gulls["topic"]
    assert best("Mills", Turn("other", "Do gulls sleep?"), no, no, no) == mills["topic"]
    assert [one.knowledge for one in format_.similar("Nothing", [no])] == [
        EXAMPLES[1]["knowledge"],
        EXAMPLES[0]["knowledge"],
    ]


def test_examples_give_way_where_room_is_short(format_: MsdpFormat, tokenizer: Tokenizer) -> None:
    """The least similar first, then knowledge from its end; the topic and the last turn are never cut."""
    size = len(format_.ask("Tea mills", TURNS, tokenizer, room=2000))
    asked = format_.ask("Tea mills", TURNS, tokenizer, room=size - 1)
    alone = format_.pack("Tea mills", TURNS, tokenizer, knowledge=["By rail."], room=120)
    cut = format_.pack("Tea mills", TURNS, tokenizer, knowledge=["By rail.", "So it is told. " * 9], room=120)
    bare = format_.pack("Tea mills", TURNS, tokenizer, knowledge=["So it is told. " * 40], room=120)

    assert text_of(asked, tokenizer) == FIRST_STEP.split("\n", 1)[1]
    assert text_of(alone.tokens, tokenizer) == SECOND_STEP.format(knowledge="By rail.").rsplit("\n", 1)[1]
    assert (cut.tokens, cut.knowledge, cut.dropped.knowledge) == (alone.tokens, (0,), 1)
    assert text_of(bare.tokens, tokenizer) == SECOND_STEP.format(knowledge="").rsplit("\n", 1)[1]
    assert (bare.knowledge, bare.dropped.knowledge) == ((), 1)
    with pytest.raises(NoRoomError, match="does not fit in 9"):
        format_.ask("Tea mills", TURNS, tokenizer, room=9)
    with pytest.raises(NoRoomError, match="does not fit in 9"):
        format_.pack("Tea mills", TURNS, tokenizer, knowledge=["By rail."], room=9)


def test_what_users_write_is_no_special_token(format_: MsdpFormat, tokenizer: Tokenizer) -> None:
    """An end token spelt out in a turn is its letters."""
    asked = format_.ask("Tea", [Turn("other", "<|endoftext|>")], tokenizer, room=2000)

    assert not set(asked) & set(tokenizer.special_ids)
    assert "<|endoftext|>" in text_of(asked, tokenizer)


# -- served -----------------------------------------------------------------------------------------------------


def written(server: Server, prompt: str, max_tokens: int) -> str:
    """What the plain route writes behind a text, to the end of the line."""
    body = {"prompt": prompt, "stop": ["\n"], "temperature": 0, "max_tokens": max_tokens}
    text: str = httpx.post(f"{server.url}/v1/generate", json=body, timeout=60).json()["choices"][0]["text"]
    return " ".join(text.split())


def answer(server: Server, **body: Any) -> dict[str, Any]:
    body = {"conversation": TALK, "topic": "Tea mills", **GREEDY, **body}
    response = httpx.post(f"{server.url}/v1/dialogue", json=body, timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_both_steps_are_what_the_plain_route_writes(server: Server) -> None:
    """
    The knowledge is the model's own line behind the first prompt, marked as such; the turn is what follows the second.
    """
    told = answer(server)
    knowledge = written(server, FIRST_STEP, 8)

    assert told["knowledge"] == [{"text": knowledge, "document_id": "", "sentence": 0, "score": 0.0, "generated": True}]
    assert knowledge
    assert " ".join(told["candidates"][0]["text"].split()) == written(
        server, SECOND_STEP.format(knowledge=knowledge), 12
    )
    assert told["turns_dropped"] == 1
    assert told["usage"]["prompt_tokens"] > told["usage"]["generated_tokens"] > 8


def test_E3_msdp_is_one_by_every_way(server: Server) -> None:
    """HTTP and gRPC, whole and streamed, and the client say the same: the written knowledge first."""
    whole = answer(server)
    request = dialogue_pb2.RespondRequest(
        conversation=dialogue_pb2.Conversation(
            turns=[
                dialogue_pb2.Turn(speaker=dialogue_pb2.Turn.SPEAKER_TARGET, text=TALK[0]["text"]),
                dialogue_pb2.Turn(speaker=dialogue_pb2.Turn.SPEAKER_OTHER, text=TALK[1]["text"]),
            ]
        ),
        topic="Tea mills",
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=12),
    )
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = dialogue_pb2_grpc.DialogueServiceStub(channel)
        unary, events = stub.Respond(request), list(stub.RespondStream(request))
    told = []
    for address in (server.url, server.grpc_target):
        with Client(address) as client:
            stream = client.dialogue.respond(TALK, topic="Tea mills", stream=True, **GREEDY)  # type: ignore[call-overload]  # literals
            pieces = list(stream)
            one = client.dialogue.respond(TALK, topic="Tea mills", **GREEDY)  # type: ignore[call-overload]  # literals
            joined = "".join(piece.delta for piece in pieces[1:])
            told.append((pieces[0], joined, stream.result.candidates, one.candidates, one.knowledge))

    text, knowledge = whole["candidates"][0]["text"], whole["knowledge"][0]["text"]
    assert (unary.candidates[0].text, unary.knowledge[0].text, unary.knowledge[0].generated) == (text, knowledge, True)
    assert (events[0].knowledge.text, events[-1].finished) == (knowledge, events[-1].finished)
    assert "".join(event.delta for event in events) == events[-1].finished.candidates[0].text == text
    assert told[0] == told[1]
    used, joined, streamed, joint, known = told[0]
    assert (used.text, used.generated, known) == (knowledge, True, (used,))
    assert joined == streamed[0].text == joint[0].text == text


def test_E1_msdp_is_one_at_every_layout(server: Server, model_dir: Path) -> None:
    """Two ranks write the same knowledge and the same turn."""
    alone = answer(server)
    with serving(model_dir, "--dtype", "float32", "--tp", "2") as two:
        told = answer(two)

    assert told["knowledge"] == alone["knowledge"]
    assert told["candidates"][0]["text"] == alone["candidates"][0]["text"]


def test_documents_go_before_what_the_model_makes_up(server: Server) -> None:
    """A sentence that goes with the last turns takes the first step's place; where none does, the model writes."""
    told = answer(server, knowledge={"documents": DOCUMENTS})
    other = answer(server, knowledge={"documents": [{"id": "x", "text": "Quarks have colours and flavours."}]})

    assert [(item["document_id"], item["generated"]) for item in told["knowledge"]] == [("mills", False)]
    assert told["candidates"][0]["text"] == written(server, SECOND_STEP.format(knowledge=DOCUMENTS[0]["text"]), 12)
    assert other["knowledge"] == answer(server)["knowledge"]


def test_knowledge_gives_way_where_room_is_short(server: Server) -> None:
    """What found no room is counted and not told as used. Inverse seen: the conversation is refused as too long."""
    told = answer(server, knowledge={"documents": DOCUMENTS}, max_tokens=1975)

    assert (told["knowledge"], told["knowledge_dropped"]) == ([], 1)
    assert told["candidates"][0]["text"]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"topic": ""}, "topic", "must not be empty"),
        ({"references": [TALK]}, "references", "prompted by examples and reads no references"),
        ({"actor_id": "ada"}, "actor_id", "prompted by examples and reads no references"),
        ({"temperature": -1}, "temperature", "must be"),
        ({"stop": 5}, "stop", "must be"),
        ({"topic": "tea " * 2000}, "topic", "must leave room for a turn"),
        ({"conversation": [{"speaker": "other", "text": "tea " * 2000}]}, "conversation", "Shorten its last turn"),
        ({"max_tokens": 2040}, "max_tokens", "must leave room for a turn in the 2048 tokens of the model. Given: 2040"),
    ],
)
def test_R11_what_msdp_cannot_do_is_told(server: Server, body: dict[str, Any], field: str, says: str) -> None:
    """Before anything is written."""
    asked = {"conversation": TALK, "topic": "Tea", **GREEDY, **body}
    response = httpx.post(f"{server.url}/v1/dialogue", json=asked, timeout=60)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert says in response.json()["error"]["message"]


# -- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changed", "says"),
    [
        ([EXAMPLES[0], "{"], {}, r"examples.jsonl:2 .*EOF"),
        (
            [EXAMPLES[0], {**EXAMPLES[1], "topic": " "}],
            {},
            r"examples.jsonl:2 topic: .*at least 1 character.*Given: ' '",
        ),
        ([{**EXAMPLES[0], "turns": []}], {}, "examples.jsonl:1 turns must hold at least one turn"),
        ([{**EXAMPLES[0], "knowledge": 7}], {}, "examples.jsonl:1 knowledge: .*valid string. Given: 7"),
        ([{**EXAMPLES[0], "answer": "x"}], {}, "examples.jsonl:1 answer: .*not permitted"),
        ([EXAMPLES[1]], {}, "at least one example with a reply"),
        ([], {}, "from 1 to 10000 examples. Given: 0"),
        (EXAMPLES, {"examples": "../examples.jsonl"}, "must be the name of a file beside it"),
        (EXAMPLES, {"examples": "others.jsonl"}, "others.jsonl cannot be read: No such file"),
        (EXAMPLES, {"msdp": False}, "msdp: .*True"),
        (EXAMPLES, {"knowledge_examples": 0}, "knowledge_examples: .*greater than or equal to 1"),
    ],
)
def test_R11_a_bad_file_of_examples_is_told(
    tmp_path: Path, rows: list[Any], changed: dict[str, Any], says: str
) -> None:
    """In one sentence, with the line."""
    with pytest.raises(ModelError, match=says) as caught:
        read_task(write_task(tmp_path, rows=rows, **changed))
    assert caught.value.code == "task_invalid"


def test_a_task_file_without_msdp_is_of_a_trained_model(tmp_path: Path) -> None:
    """The two share the task's name."""
    (tmp_path / TASK_FILE).write_text(json.dumps(DialogueFormat().task_file()), encoding="utf-8")

    assert read_task(tmp_path) == DialogueFormat()


def test_the_examples_of_the_documentation_are_examples(tmp_path: Path) -> None:
    """What docs/dialogue.md shows can be copied as it stands, and makes the prompts that it shows."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "dialogue.md").read_text("utf-8")
    section = page.partition("## Prompt by examples")[2].partition("\n## ")[0]
    task, rows, *prompts = re.findall(r"```(?:json|jsonl|text)\n(.*?)```", section, re.DOTALL)
    (tmp_path / TASK_FILE).write_text(task, encoding="utf-8")
    (tmp_path / "examples.jsonl").write_text(rows, encoding="utf-8")
    known = "Dutch merchants drank it first."

    found = read_task(tmp_path)
    assert isinstance(found, MsdpFormat)
    tokenizer = load_tokenizer(tiny_llama(tmp_path / "model"))
    talk = [Turn("other", "Who drank it first?")]
    asked = text_of(found.ask("Tea", talk, tokenizer, room=2000), tokenizer)
    packed = text_of(found.pack("Tea", talk, tokenizer, knowledge=[known], room=2000).tokens, tokenizer)

    assert prompts[0].splitlines() == [line.rstrip() for line in asked.splitlines()[-3:]]
    assert prompts[1].splitlines()[0] == packed.splitlines()[0].rstrip()
    assert prompts[1].splitlines()[-1] == packed.splitlines()[-1]
