"""The playground's key and its code snippets, and the API reference, against real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser.conftest import API_KEY
from browser.pages import Server, Watched
from playwright.sync_api import Page, expect

Visit = Callable[..., Watched]


def shown_snippet(page: Page, language: str) -> str:
    """The code of the request on screen in one language."""
    page.check(f"input[name=snippet][value={language}]")
    return page.locator("#snippet").text_content() or ""


def run_snippet(code: str, folder: Path, language: str, **environment: str) -> str:
    """The standard output of a snippet, as bash or this Python runs it."""
    file = folder / "snippet"
    file.write_text(code)
    command = ["bash", str(file)] if language == "curl" else [sys.executable, "-X", "utf8", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )

    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


def streamed_text(events: str) -> str:
    """The text of OpenAI's server-sent events."""
    chunks: list[dict[str, Any]] = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_S3_the_key_is_asked_for_and_kept_in_memory_only(keyed_server: Server, visit: Visit) -> None:
    """Without a key the field says so; with it everything works; it is stored nowhere and a reload forgets it."""
    page = visit(keyed_server).page
    expect(page.locator("#p-api_key")).to_be_visible()
    expect(page.locator("#p-api_key-wrong")).not_to_be_empty()
    page.fill("#p-api_key", API_KEY)
    page.press("#p-api_key", "Tab")
    expect(page.locator("#p-api_key-wrong")).to_be_hidden()
    page.fill("#p-max_tokens", "8")
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    page.locator(".turn.assistant:not(.streaming) .notes").wait_for()

    expect(page.locator(".failure")).to_have_count(0)
    expect(page.locator("#vital-waiting")).to_have_text("0")
    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
    assert stored == [0, 0, "", keyed_server.origin + "/"]
    assert all(API_KEY not in shown_snippet(page, language) for language in ("curl", "openai", "trilithon"))
    page.reload()
    expect(page.locator("#p-api_key")).to_have_value("")


@pytest.mark.parametrize("language", ["curl", "openai", "trilithon"])
def test_snippets_are_the_request_on_screen(language: str, server: Server, visit: Visit, tmp_path: Path) -> None:
    """Each snippet, pasted and run, prints the answer that the page gets for the same request."""
    page = visit(server).page
    fields = {"temperature": "0", "max_tokens": "12", "seed": "9223372036854775807", "stop": "it's \\n\nqq"}
    for name, value in fields.items():
        page.fill(f"#p-{name}", value)
    page.fill("#prompt", 'Say "it\'s" \\ $HOME `x`')
    code = shown_snippet(page, language)
    page.press("#prompt", "Enter")
    page.locator(".turn.assistant:not(.streaming) .notes").wait_for()
    answer = page.locator(".turn.assistant .body").text_content()
    output = run_snippet(code, tmp_path, language)

    assert (streamed_text(output) if language == "curl" else output) == answer


def test_snippets_of_a_keyed_server_take_the_key_from_the_environment(
    keyed_server: Server, visit: Visit, tmp_path: Path
) -> None:
    """With a key on the page, snippets read it from TRILITHON_API_KEY."""
    page = visit(keyed_server).page
    page.fill("#p-api_key", API_KEY)
    page.press("#p-api_key", "Tab")
    expect(page.locator("#p-api_key-wrong")).to_be_hidden()
    page.fill("#p-max_tokens", "4")
    for language in ("curl", "openai", "trilithon"):
        run_snippet(shown_snippet(page, language), tmp_path, language, TRILITHON_API_KEY=API_KEY)


def test_copy_puts_the_snippet_on_the_clipboard(server: Server, visit: Visit) -> None:
    """The button copies the text on screen and says so."""
    page = visit(server).page
    code = shown_snippet(page, "curl")
    page.click("#copy-snippet")

    expect(page.locator("#copy-snippet")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_the_reference_shows_every_operation(server: Server, visit: Visit) -> None:
    """Each path and method of the OpenAPI document has a section, with its body's fields; the filter narrows it."""
    document = json.loads(server.get("/openapi.json"))
    operations = [
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method in item
        if method in {"get", "post", "put", "patch", "delete"}
    ]
    page = visit(server, "/docs").page
    page.locator(".operation").first.wait_for()
    titles = page.locator(".operation:not(.shape) h3").evaluate_all(
        "all => all.map((e) => [e.querySelector('.method').textContent, e.querySelector('code').textContent])"
    )

    assert sorted(map(tuple, titles)) == sorted(operations)
    chat = page.locator(".operation", has=page.locator("h3 code", has_text="/v1/chat/completions"))
    expect(chat.locator("th code", has_text="messages").first).to_be_visible()
    expect(chat.locator("th code", has_text="top_p_decay").first).to_be_visible()
    page.fill("#filter", "chat completions top_p_decay")
    expect(page.locator(".operation:visible h3 code", has_text="/v1/chat/completions")).to_be_visible()
    assert page.locator(".operation:visible").count() < len(operations)


def test_S3_the_reference_asks_for_a_key_where_the_document_needs_one(keyed_server: Server, visit: Visit) -> None:
    """With `--public-ui` the reference is readable without a key."""
    page = visit(keyed_server, "/docs").page

    expect(page.locator(".operation").first).to_be_visible()
