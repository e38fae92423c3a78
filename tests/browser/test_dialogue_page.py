"""The page of conversations: what an answer stands on is given beside it and shown under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser.conftest import API_KEY
from browser.pages import CONTRAST, Server, Watched
from playwright.sync_api import Page, expect

Visit = Callable[..., Watched]

FACTS = "The sea is two days from the old mill. Nobody counts the gulls of the coast today."


def ready(page: Page) -> Page:
    """Short greedy answers."""
    expect(page.locator("#ready-text")).to_have_text("ready")
    page.fill("#ask-temperature", "0")
    page.fill("#ask-max_tokens", "8")
    return page


def say(page: Page, text: str) -> None:
    """Send it and wait until its answer is whole."""
    page.fill("#say", text)
    page.press("#say", "Enter")
    expect(page.locator(".turn.them").last).to_contain_text(text)
    page.locator(".turn.assistant:last-child:not(.streaming) .notes").wait_for()


def sent(watched: Watched) -> list[dict[str, Any]]:
    """Bodies of the questions so far."""
    return [body for path, body in watched.bodies if path == "/v1/dialogue"]


def test_an_answer_shows_what_it_stands_on(server: Server, visit: Visit, tmp_path: Path) -> None:
    """
    Documents typed and read from files, and earlier conversations, travel with the question; the sentences that were
    used are listed with their document; the next question carries the conversation so far.
    """
    html = tmp_path / "town.html"
    html.write_text("<html><body><p>The town has a market on every Friday of the year.</p></body></html>")
    watched = visit(server, "/dialogue")
    page = ready(watched.page)
    page.click("#add-document")
    page.fill(".documents textarea", FACTS)
    page.set_input_files("#document-files", html)
    expect(page.locator(".documents li")).to_have_count(2)
    page.fill("#ask-references", "Me: I never leave the mill.\nThem: Why not?\n\nMe: Good\nmorning.")
    say(page, "How far is the sea from the old mill?")

    body = sent(watched)[0]
    assert [[document["id"], sorted(document)] for document in body["knowledge"]["documents"]] == [
        ["document 1", ["id", "text"]],
        ["town.html", ["html", "id"]],
    ]
    assert body["references"] == [
        [{"speaker": "target", "text": "I never leave the mill."}, {"speaker": "other", "text": "Why not?"}],
        [{"speaker": "target", "text": "Good morning."}],
    ]
    answer = server.post("/v1/dialogue", {**body, "stream": False})
    expect(page.locator(".turn.assistant .said")).to_have_text(answer["candidates"][0]["text"])
    page.click(".grounds summary")
    used = page.locator(".grounds li")
    expect(used).to_have_count(len(answer["knowledge"]))
    expect(used.first).to_contain_text("The sea is two days from the old mill.")
    expect(used.first.locator("small")).to_contain_text("document 1")
    expect(page.locator(".turn.assistant .notes")).to_contain_text(f"{answer['reference_tokens']} tokens of earlier")

    page.click(".documents li:last-child button")
    say(page, "And the town?")
    second = sent(watched)[1]
    assert [turn["speaker"] for turn in second["conversation"]] == ["other", "target", "other"]
    assert [document["id"] for document in second["knowledge"]["documents"]] == ["document 1"]
    page.locator(".turn.assistant").first.get_by_role("button", name="Try again").click()
    expect(page.locator(".turn.them")).to_have_count(1)


def test_what_is_refused_stands_beside_its_field(server: Server, visit: Visit) -> None:
    """A broken rule at its field, others in the card; the question stays in the box, and the conversation as it was."""
    page = ready(visit(server, "/dialogue").page)
    page.fill("#ask-temperature", "-1")
    page.fill("#say", "How far?")
    page.press("#say", "Enter")
    expect(page.locator("#ask-temperature-wrong")).to_contain_text("temperature")
    expect(page.locator("#ask-temperature")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#say")).to_have_value("How far?")
    page.fill("#ask-temperature", "0")
    expect(page.locator("#ask-temperature-wrong")).to_be_empty()
    page.fill("#ask-topic", "Mills")
    page.press("#say", "Enter")
    expect(page.locator("#ask-topic-wrong")).to_contain_text("not prompted by examples")
    page.fill("#ask-topic", " ")
    page.click("#add-document")
    page.fill(".documents textarea", FACTS)
    page.select_option("#ask-knowledge-scorer", "dense")
    page.press("#say", "Enter")
    expect(page.locator(".failure .error-code")).to_have_text("unsupported_model")
    page.select_option("#ask-knowledge-scorer", "bm25")
    say(page, "How far?")

    expect(page.locator(".failure")).to_have_count(0)
    expect(page.locator(".turn")).to_have_count(2)


def test_an_answer_can_be_stopped(server: Server, visit: Visit) -> None:
    """Esc ends it; what was said until then stays, and the page takes the next question."""
    page = ready(visit(server, "/dialogue").page)
    page.fill("#ask-max_tokens", "2000")
    page.fill("#say", "Tell me all.")
    page.press("#say", "Enter")
    page.locator("#stop").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator(".turn.assistant .notes span").first).to_have_text("stopped")
    page.fill("#ask-max_tokens", "8")
    say(page, "Shorter?")

    expect(page.locator("#go")).to_be_visible()


def test_clear_during_an_answer_begins_a_new_conversation(server: Server, visit: Visit) -> None:
    """
    The answer that was cut off belongs to the conversation that is gone: the next one begins with its own first turn,
    whether text had come or not. Seen to fail with the answer put into the conversation that is there when it ends.
    """
    watched = visit(server, "/dialogue")
    page = ready(watched.page)
    for text_came in (True, False):
        say(page, "How far is the sea?")
        page.fill("#ask-max_tokens", "2000")
        if not text_came:
            page.route("**/v1/dialogue", lambda route: None, times=1)  # the answer never begins
        page.fill("#say", "Tell me all.")
        page.press("#say", "Enter")
        page.locator("#stop").wait_for()
        if text_came:
            expect(page.locator(".turn.assistant").last.locator(".said")).not_to_be_empty()
        page.click("#clear")
        expect(page.locator("#go")).to_be_visible()
        expect(page.locator(".turn")).to_have_count(0)
        page.fill("#ask-max_tokens", "8")
        say(page, "Shorter?")
        assert sent(watched)[-1]["conversation"] == [{"speaker": "other", "text": "Shorter?"}]
        expect(page.locator(".turn")).to_have_count(2)
        page.click("#clear")


def test_S3_the_page_asks_for_the_key(keyed_server: Server, visit: Visit) -> None:
    """Without one the box appears; with it the models do; it is kept nowhere."""
    page = visit(keyed_server, "/dialogue").page
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", API_KEY)
    page.press("#key", "Enter")
    expect(page.locator("#ask-model option")).to_have_text([keyed_server.model])

    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_the_page_is_readable_and_fits(server: Server, visit: Visit, width: int, scheme: str) -> None:
    """Nothing is wider than the window, and small print has a contrast of 4.5 at least."""
    page = ready(visit(server, "/dialogue", width=width, scheme=scheme).page)
    page.click("#add-document")
    page.fill(".documents textarea", FACTS)
    say(page, "How far is the sea from the old mill?")
    contrasts = page.evaluate(CONTRAST, [".field > label", ".field-hint", ".notes span", ".grounds summary"])

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}
