"""
How long the served tasks take, one request at a time and eight at once, and for what share of it the engines work.

    python benchmarks/systems.py
    python benchmarks/systems.py --concepts ../shared/data/kb/conceptnet100k_train.tsv --passes 5

A server of SmolLM2-135M-Instruct and all-MiniLM-L6-v2 is started on this machine. Each pass sends `--requests` requests
that differ, so that the prefix cache has only what a task itself shares between its steps. Told are the median latency
with the least and the greatest pass, and the engines' share: seconds that steps took by the clock of the pass, which
is above 1 where both engines work at the same time. The rest is the front's: texts, knowledge, ranking, waiting.

Last comes what a kept actor saves: the time to the first token of a first and of a second turn, which says something
else, in the voice of one actor of some 512 tokens, of `--pairs` actors after a first one that warms up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from serving import our_server

from trilithon import Client

WRITER, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
GREEDY = {"temperature": 0.0, "seed": 1}
PLACES = ("Aden", "Bergen", "Cadiz", "Derby", "Evora", "Fes", "Ghent", "Haifa", "Izmir", "Jena", "Kyoto", "Lagos")
CONCURRENCY = (1, 8)

Body = dict[str, Any]


def document(number: int) -> str:
    """Some sentences that no other number has."""
    place = PLACES[number % len(PLACES)]
    return (
        f"The old bridge of {place} has {number} arches of grey stone. It was built by masons from the hills. "
        f"Every spring the river rises by {number + 2} feet and the mills of {place} stand still for a week. "
        f"A market for wool is held on the square behind the bridge, and {number} families live above the shops."
    )


def question(number: int) -> str:
    """Its answer stands in `document(number)`."""
    return f"How many arches has the old bridge of {PLACES[number % len(PLACES)]}?"


def dialogue(number: int) -> Body:
    """A turn that stands on a document and an earlier conversation."""
    return {
        "conversation": [{"speaker": "other", "text": question(number)}],
        "references": [[{"speaker": "target", "text": f"I have {number} sheep and never leave the valley."}]],
        "knowledge": {"documents": [{"id": "town", "text": document(number)}]},
        "max_tokens": 32,
        **GREEDY,
    }


def story(number: int) -> Body:
    """Four sentences."""
    place = PLACES[number % len(PLACES)]
    return {"first_sentence": f"Mia lost her {number} kites in {place}.", "max_tokens": 32, "seed": number}


def open_answer(number: int) -> Body:
    """A question and the documents to read."""
    documents = [{"id": str(i), "text": document(number + i)} for i in range(4)]
    body = {"question": question(number), "documents": documents, "reader": "causal", "retriever": ENCODER}
    return {**body, "sampling": {"max_tokens": 16}}


def synthesis(number: int) -> Body:
    """Two questions of one passage, not read again: no reader is served."""
    passages = [{"id": str(number), "text": document(number)}]
    return {"passages": passages, "answers_per_passage": 1, "questions_per_answer": 2, "filter": "none"}


def search(number: int) -> Body:
    """Of an index of sixty passages."""
    return {"index": "towns", "queries": [question(number)], "top_k": 5, "mode": "hybrid"}


TASKS: Mapping[str, tuple[str, Callable[[int], Body], bool]] = {
    "dialogue": ("/v1/dialogue", dialogue, True),
    "stories": ("/v1/stories", story, True),
    "openqa": ("/v1/openqa", open_answer, True),
    "synthetic-qa": ("/v1/synthetic-qa", synthesis, True),
    "search": ("/v1/retrieval/search", search, False),
}
"""Route, body, and whether the writer is named in it."""


def step_seconds(http: httpx.Client) -> float:
    """Of all engines so far."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("trilithon_step_seconds_sum"))


def one_pass(http: httpx.Client, path: str, bodies: Sequence[Body], concurrency: int) -> tuple[float, float, float]:
    """Median latency, requests a second, and the engines' share."""

    def send(body: Body) -> float:
        began = time.perf_counter()
        response = http.post(path, json=body)
        response.raise_for_status()
        return time.perf_counter() - began

    worked, began = step_seconds(http), time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        latencies = list(pool.map(send, bodies))
    seconds = time.perf_counter() - began
    return statistics.median(latencies), len(bodies) / seconds, (step_seconds(http) - worked) / seconds


ACTOR_TURNS = 13
"""Of some 40 tokens each."""


def actor_pair(http: httpx.Client, number: int) -> tuple[float, float, int]:
    """Milliseconds to the first token of an actor's first turn and of the second one; tokens of the references."""
    turns = [{"speaker": "target", "text": document(number * ACTOR_TURNS + i)[:140]} for i in range(ACTOR_TURNS)]
    http.put(f"/v1/dialogue/actors/actor-{number}", json={"conversations": [turns]}).raise_for_status()
    took, size = [], 0
    for said in ("What do you see from the window?", "And who lives above the shops?"):
        talk = [{"speaker": "other", "text": said}]
        body = {"model": WRITER, "conversation": talk, "actor_id": f"actor-{number}", "max_tokens": 4, **GREEDY}
        response = http.post("/v1/dialogue", json=body)
        response.raise_for_status()
        told = response.json()
        took.append(told["timings"]["first_token_ms"])
        size = told["reference_tokens"]
    first, second = took
    return first, second, size


def tell_actors(http: httpx.Client, pairs: int) -> None:
    """The medians, and the second by the first."""
    found = [actor_pair(http, number) for number in range(pairs + 1)][1:]
    first, second = (statistics.median(pair[i] for pair in found) for i in (0, 1))
    ratios = sorted(pair[1] / pair[0] for pair in found)
    told = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"
    print(f"first token of an actor's first turn {first:.0f} ms, of the second {second:.0f} ms, second / first {told}")
    print(f"tokens of references {min(pair[2] for pair in found)} to {max(pair[2] for pair in found)}")


def build_index(url: str) -> None:
    """Sixty passages."""
    with Client(url, timeout=120) as client:
        documents = [{"id": str(i), "text": document(i)} for i in range(60)]
        client.retrieval.create_index("towns", documents=documents, model=ENCODER)
        while client.retrieval.get_index("towns").state == "building":
            time.sleep(0.1)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--requests", type=int, default=8, help="of a pass")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=5, help="actors whose first and second turn are compared")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--concepts", type=Path, default=None, help="facts for the stories, relation<TAB>head<TAB>tail")
    args = parser.parse_args()
    scratch = tempfile.TemporaryDirectory(prefix="trilithon-systems-")
    settings = {
        "engines.1.name": "encoder",
        "engines.1.model": ENCODER,
        "engines.1.memory_fraction": 0.1,
        "server.store": scratch.name,
    }
    if args.concepts is not None:
        settings["server.concepts"] = args.concepts.resolve()
    flags = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    print(f"{'task':14} {'at once':>7} {'latency s':>22} {'requests/s':>11} {'engines':>8}")
    with (
        scratch,
        our_server(WRITER, args.dtype, flags) as server,
        httpx.Client(base_url=server.url, timeout=600) as http,
    ):
        build_index(server.url)
        number = 0
        for task, (path, make, named) in TASKS.items():
            for concurrency in CONCURRENCY:
                found = []
                for _ in range(args.passes + 1):  # the first one warms up
                    bodies = [
                        {**make(i), **({"model": WRITER} if named else {})}
                        for i in range(number, number + args.requests)
                    ]
                    number += args.requests
                    found.append(one_pass(http, path, bodies, concurrency))
                latency, rate, shares = zip(*found[1:], strict=True)
                middle, share = f"{statistics.median(latency):.2f}", statistics.median(shares)
                told = f"{middle} [{min(latency):.2f} .. {max(latency):.2f}]"
                print(f"{task:14} {concurrency:7} {told:>22} {statistics.median(rate):11.2f} {share:8.2f}")
        tell_actors(http, args.pairs)


if __name__ == "__main__":
    main()
