"""The page of stories: keywords and knowledge beside each sentence, and a story written again from one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.conftest import free_ports
from browser.pages import CONTRAST, Server, Watched, serve
from playwright.sync_api import Page, Route, expect
from tiny import tiny_bert

Visit = Callable[..., Watched]

CONCEPTS = "AtLocation\tboat\tharbour\nUsedFor\tboat\tcross river\nDesires\tdog\tbone\nantonym\tearly\tlate\n"


@pytest.fixture(scope="module")
def teller(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a decoder, an encoder and a few concepts."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "village").mkdir()
    (folder / "village" / "facts.tsv").write_text(CONCEPTS)
    told = {
        "engines.1.name": "encoder",
        "engines.1.model": tiny_bert(folder / "encoder"),
        "engines.1.num_threads": 1,
        "engines.1.memory_fraction": 0.1,
        "server.concepts": folder / "village",
    }
    flags = [argument for name, value in told.items() for argument in ("--set", f"{name}={value}")]
    with serve(model_dir, free_ports(), folder / "server.log", *flags) as server:
        yield server


def ask(page: Page, *, first: str = "The old miller had a dog.", controls: str = "", sentences: int = 3) -> None:
    """Fill the form and write; until the story is whole."""
    expect(page.locator("#ready-text")).to_have_text("ready")
    page.fill("#ask-first_sentence", first)
    page.fill("#ask-controls", controls)
    page.fill("#ask-sentences", str(sentences))
    page.fill("#ask-seed", "11")
    page.fill("#ask-max_tokens", "12")
    page.click("#go")
    whole(page, sentences + 1)


def whole(page: Page, sentences: int) -> None:
    expect(page.locator("#story .sentence")).to_have_count(sentences)
    expect(page.locator("#notes")).to_contain_text("seed 11")


def texts(page: Page) -> list[str]:
    return page.locator("#story .said").all_text_contents()


def test_keywords_and_knowledge_are_shown_and_edited(teller: Server, visit: Visit) -> None:
    """
    Each sentence has its keywords in a field and the facts that it was written from; with other keywords the story is
    written again from there, the sentences before it as they were, byte for byte.
    """
    watched = visit(teller, "/stories")
    page = watched.page
    ask(page, controls="2: boat\n3: dog, lamp")
    before = texts(page)
    posted: list[dict[str, Any]] = [body for path, body in watched.bodies if path == "/v1/stories"]
    assert posted[0]["controls"] == [{"index": 2, "keywords": ["boat"]}, {"index": 3, "keywords": ["dog", "lamp"]}]
    expect(page.locator("#keywords-2")).to_have_value("boat")
    expect(page.locator("#keywords-3")).to_have_value("dog, lamp")
    expect(page.locator("#keywords-1")).to_have_count(0)
    expect(page.locator('[data-index="2"] .grounds li').first).to_contain_text("boat")
    expect(page.locator('[data-index="3"] .notes')).to_contain_text("nothing known of lamp")

    page.fill("#keywords-3", "boat")
    page.press("#keywords-3", "Enter")
    expect(page.locator("#keywords-3")).to_have_value("boat")
    whole(page, 4)
    after = texts(page)
    assert after[:2] == before[:2]
    assert after[2] != before[2]
    expect(page.locator(".sentence[data-reused]")).to_have_count(2)
    expect(page.locator('[data-index="2"] .notes')).to_contain_text("as it was")
    expect(page.locator('[data-index="3"] .grounds li').first).to_contain_text("boat")
    expect(page.locator("#notes")).to_contain_text("cached")

    page.fill("#keywords-4", "early")
    page.locator('[data-index="4"] .opposite').click()
    expect(page.locator("#keywords-4")).to_have_value("late")
    assert texts(page)[:3] == after[:3]


def test_what_is_refused_leaves_the_story(teller: Server, visit: Visit) -> None:
    """Broken rules stand at their field; the story that is there stays, and can still be written on."""
    page = visit(teller, "/stories").page
    ask(page)
    before = texts(page)
    page.fill("#keywords-3", "")
    page.press("#keywords-3", "Enter")
    expect(page.locator(".failure")).to_contain_text("keywords")
    assert texts(page) == before
    page.fill("#ask-controls", "9: boat")
    page.click("#go")
    expect(page.locator("#ask-controls-wrong")).to_contain_text("controls[0]")
    page.fill("#ask-controls", "")
    page.fill("#ask-first_sentence", " ")
    page.click("#go")
    expect(page.locator("#ask-first_sentence-wrong")).not_to_be_empty()
    ask(page)

    assert texts(page) == before


def cut_off(page: Page, path: str) -> None:
    """The next request there runs out of time before anything is written, when it has begun on the server."""

    def run_out(route: Route) -> None:
        route.continue_(post_data=json.dumps({**(route.request.post_data_json or {}), "time_limit_ms": 1}))

    page.route(path, run_out, times=1)


def lose(page: Page, path: str) -> None:
    """The engine is lost behind the first event of the next request there."""
    lost = event("error", error={"message": "The engine was lost.", "code": "engine_lost"})

    def begin(route: Route) -> None:
        started = event("started", story_id=route.request.url.split("/")[-2])
        route.fulfill(body=started + lost, content_type="text/event-stream")

    page.route(path, begin, times=1)


def event(name: str, **document: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(document)}\n\n"


def test_a_rewrite_that_fails_leaves_what_the_server_has(teller: Server, visit: Visit) -> None:
    """
    A rewrite that fails before its first new sentence changes nothing on the server: the page shows the whole story
    again, and it can be rewritten. Seen to fail where the page keeps what the rewrite began with.
    """
    watched = visit(teller, "/stories")
    page = watched.page
    ask(page)
    before = texts(page)
    cut_off(page, "**/rewrite")
    page.fill("#keywords-3", "boat")
    page.press("#keywords-3", "Enter")
    expect(page.locator(".failure .error-code")).to_have_text("timeout")
    expect(page.locator("#story .sentence")).to_have_count(len(before))
    assert texts(page) == before
    page.locator("#story .sentence").last.locator("input").fill("dog")
    page.locator("#story .sentence").last.locator("input").press("Enter")
    whole(page, 4)

    expect(page.locator(".failure")).to_have_count(0)
    expect(page.locator('#story [data-index="3"]')).to_have_attribute("data-reused", "")
    expect(page.locator("#keywords-4")).to_have_value("dog")


def test_a_story_that_is_refused_takes_nothing_away(teller: Server, visit: Visit) -> None:
    """
    The page stands on the story that is there: what comes before a rewrite stays where that fails at once. Seen to fail
    with the sentences cleared as the form is sent.
    """
    page = visit(teller, "/stories").page
    ask(page)
    before = texts(page)
    page.fill("#ask-first_sentence", " ")
    page.click("#go")
    expect(page.locator("#ask-first_sentence-wrong")).not_to_be_empty()
    lose(page, "**/rewrite")
    page.fill("#keywords-4", "dog")
    page.press("#keywords-4", "Enter")
    expect(page.locator(".failure .error-code")).to_have_text("engine_lost")

    expect(page.locator("#story .sentence")).to_have_count(len(before))
    assert texts(page) == before


STREAM = """() => {
  const fetched = window.fetch;
  const body = new ReadableStream({ start: (controller) => (window.told = controller) });
  const answer = new Response(body, { headers: { "content-type": "text/event-stream" } });
  window.fetch = (path, init) => (path === "/v1/stories" ? Promise.resolve(answer) : fetched(path, init));
}"""
"""A story that the test tells: its events go to `window.told`."""


def sentence(index: int) -> str:
    return event(
        "sentence", index=index, text=f"Sentence {index}.", keywords=["boat"], facts=[], logprob=-1.0, reused=False
    )


def test_enter_in_the_form_while_a_story_is_written_does_nothing(teller: Server, visit: Visit) -> None:
    """
    The sentences that had come stay those of the story. Seen to fail with them cleared as the form is sent, where a
    rewrite began with none of them.
    """
    page = visit(teller, "/stories").page
    expect(page.locator("#ready-text")).to_have_text("ready")
    page.evaluate(STREAM)

    def tell(*events: str) -> None:
        page.evaluate("(text) => window.told.enqueue(new TextEncoder().encode(text))", "".join(events))

    page.fill("#ask-first_sentence", "Sentence 1.")
    page.click("#go")
    page.locator("#stop").wait_for()
    tell(event("started", story_id="story_1", seed=11, model="m"), sentence(1), sentence(2))
    expect(page.locator("#story .sentence")).to_have_count(2)
    page.press("#ask-seed", "Enter")
    tell(sentence(3), event("finished", seed=11, model="m"))
    whole(page, 3)
    lose(page, "**/rewrite")
    page.fill("#keywords-3", "dog")
    page.press("#keywords-3", "Enter")
    expect(page.locator(".failure .error-code")).to_have_text("engine_lost")

    assert texts(page) == ["Sentence 1.", "Sentence 2."]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_the_page_is_readable_and_fits(teller: Server, visit: Visit, width: int, scheme: str) -> None:
    """Nothing is wider than the window, and small print has a contrast of 4.5 at least."""
    page = visit(teller, "/stories", width=width, scheme=scheme).page
    ask(page, controls="2: boat")
    contrasts = page.evaluate(CONTRAST, [".keywords label", ".grounds small", ".grounds li span", "#notes span"])

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}
