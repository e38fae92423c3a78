"""The page of open questions: an index or documents, the answer, and the passages that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser.pages import CONTRAST, Server, Watched
from open_questions import ALICE, BOB, DOCUMENTS, QUESTION, SPANS, WRITER, Open, serving_open
from playwright.sync_api import Page, expect

Visit = Callable[..., Watched]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """A server of a writer, an encoder and a reader of spans, with one index of Alice's."""
    with serving_open(tmp_path_factory.mktemp("answers")) as served:
        assert served.create("valley")["state"] == "ready"
        yield served


def enter(opened: Open, visit: Visit, *, key: str = ALICE, **options: Any) -> Watched:
    """The page, with a key."""
    watched = visit(Server(opened.server.url), "/answers", **options)
    watched.page.locator("#key").wait_for()
    watched.page.fill("#key", key)
    watched.page.press("#key", "Enter")
    expect(watched.page.locator("#ask-model option")).to_have_count(5)
    return watched


def ask(page: Page, *, model: str) -> None:
    """Until the answer is there."""
    page.select_option("#ask-model", model)
    page.fill("#ask-question", QUESTION)
    page.fill("#ask-sampling-max_tokens", "6" if model == WRITER else "")
    page.press("#ask-question", "Enter")
    expect(page.locator("#answered .notes").first).to_contain_text(model)


def test_an_answer_stands_above_the_passages_that_it_comes_from(opened: Open, visit: Visit) -> None:
    """A span is marked in its passage; with its own words the reader's answer stands alone. Both are the API's."""
    page = enter(opened, visit).page
    page.select_option("#ask-index", "valley")
    page.fill("#ask-top_k", "3")
    ask(page, model=SPANS)
    body = {"model": SPANS, "index": "valley", "question": QUESTION, "top_k": 3, "return_evidence": True}
    told = opened.post("/v1/openqa", **body)
    expect(page.locator("#answered .answer")).to_have_text(told["answer"])
    expect(page.locator(".evidence li")).to_have_count(3)
    marks = [place["candidate"] for place in told["evidence"] if place["end"]]
    assert page.locator(".evidence mark").all_text_contents() == marks
    assert told["answer"] in marks
    expect(page.locator("#answered .notes").first).to_contain_text("index version 1")

    ask(page, model=WRITER)
    words = opened.post("/v1/openqa", **{**body, "model": WRITER, "sampling": {"max_tokens": 6}})
    expect(page.locator("#answered .answer")).to_have_text(words["answer"])
    expect(page.locator(".evidence mark")).to_have_count(0)
    page.select_option("#ask-model", SPANS)
    page.click("#go")
    expect(page.locator("#ask-sampling-max_tokens-wrong")).to_contain_text("a span is found, not drawn")


def test_documents_stand_in_for_an_index(opened: Open, visit: Visit) -> None:
    """They travel with the question; without either, and without a question, the field says what is missing."""
    watched = enter(opened, visit)
    page = watched.page
    page.click("#go")
    expect(page.locator("#ask-question-wrong")).not_to_be_empty()
    page.fill("#ask-question", QUESTION)
    page.click("#go")
    expect(page.locator("#ask-documents-wrong, #ask-index-wrong").filter(has_text="index")).to_have_count(1)
    page.click("#add-document")
    page.fill(".documents textarea", DOCUMENTS[0]["text"])
    ask(page, model=WRITER)

    sent = [body for path, body in watched.bodies if path == "/v1/openqa"][-1]
    assert sent["documents"] == [{"id": "document 1", "text": DOCUMENTS[0]["text"]}]
    assert "index" not in sent
    told = opened.post("/v1/openqa", **sent)
    assert page.locator(".evidence .passage").all_text_contents() == [
        one["passage"]["text"] for one in told["evidence"]
    ]


def test_S8_indexes_of_others_are_not_offered(opened: Open, visit: Visit) -> None:
    """Bob sees none of Alice's."""
    page = enter(opened, visit, key=BOB).page

    expect(page.locator("#ask-index option")).to_have_text(["none stored"])


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_the_page_is_readable_and_fits(opened: Open, visit: Visit, width: int, scheme: str) -> None:
    """Nothing is wider than the window, and small print has a contrast of 4.5 at least."""
    page = enter(opened, visit, width=width, scheme=scheme).page
    page.select_option("#ask-index", "valley")
    ask(page, model=SPANS)
    contrasts = page.evaluate(CONTRAST, [".passage mark", ".evidence .notes span", ".evidence h3", ".field-hint"])

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}
