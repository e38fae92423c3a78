"""The playground in a real browser against a real server. Each test also ends with: no request left the origin, no
script failed, the content security policy was never broken (`Watched.check`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from browser.pages import CONTRAST, FOCUSED, Server, Watched, eventually
from playwright.sync_api import Page, expect

Visit = Callable[..., Watched]
POLICY = {
    "default-src": {"'none'"},
    "script-src": {"'self'"},
    "style-src": {"'self'"},
    "connect-src": {"'self'"},
    "img-src": {"'self'"},
    "base-uri": {"'none'"},
    "form-action": {"'none'"},
    "frame-ancestors": {"'none'"},
}


def ask(page: Page, text: str, *, wait: bool = True, **fields: str) -> None:
    """Fill parameters, send a message, wait for the end of the answer."""
    for name, value in fields.items():
        if not page.locator(f"#p-{name}").is_visible():
            page.locator(f"details:has(#p-{name}) > summary").click()
        page.fill(f"#p-{name}", value)
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        page.locator(".turn.assistant.streaming").wait_for(state="detached")


def open_all(page: Page) -> None:
    """Open every group of parameters."""
    page.evaluate("document.querySelectorAll('#params details').forEach((group) => (group.open = true))")


def overflow(page: Page) -> int:
    """Pixels that reach past the right edge."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def shown_answer(page: Page) -> str:
    """The text of the last answer."""
    return page.locator(".turn.assistant .body").last.text_content() or ""


def test_E3_shown_answer_equals_the_unstreamed_one(server: Server, visit: Visit) -> None:
    """A greedy answer on the page is, byte for byte, what one plain request returns. Seen red with a dropped delta."""
    page = visit(server).page
    ask(page, "Hello stones", temperature="0", max_tokens="48")
    plain = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hello stones"}], "temperature": 0, "max_tokens": 48},
    )

    assert shown_answer(page) == plain["choices"][0]["message"]["content"]
    expect(page.locator(".turn.assistant .notes")).not_to_contain_text("constraint")


def test_an_answer_appears_while_it_is_generated(server: Server, visit: Visit) -> None:
    """Text is on the page before the answer is complete, and grows."""
    page = visit(server).page
    ask(page, "Go on", wait=False, temperature="1", seed="5", max_tokens="1500")
    page.check("#p-ignore_eos")
    ask_again = page.locator(".turn.assistant.streaming .t")
    ask_again.first.wait_for()
    before = ask_again.count()

    assert eventually(lambda: ask_again.count() > before)
    page.keyboard.press("Escape")


def test_R6_stop_aborts_the_request_on_the_server(server: Server, visit: Visit) -> None:
    """Stop ends the answer on the page at once and frees it on the server. Seen red without the abort signal."""
    page = visit(server).page
    aborts = server.metric("trilithon_aborts_total")
    page.check("#p-ignore_eos")
    ask(page, "Never stop", wait=False, max_tokens="3500", seed="1")
    page.locator(".turn.assistant.streaming .t").first.wait_for()
    page.click("#stop")

    expect(page.locator(".turn.assistant .notes").last).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    assert eventually(lambda: server.metric("trilithon_aborts_total") == aborts + 1)
    assert eventually(lambda: server.metric("trilithon_requests_running") == 0)


def test_tokens_are_coloured_by_probability(server: Server, visit: Visit) -> None:
    """Each token has the class of its probability, and less likely tokens have a stronger colour."""
    page = visit(server).page
    ask(page, "Colours", seed="3", max_tokens="40")
    body = {"messages": [{"role": "user", "content": "Colours"}], "seed": 3, "max_tokens": 40, "logprobs": True}
    tokens = server.post("/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    bounds = (0.9, 0.6, 0.35, 0.15, 0.05, 0.01, 0.0)
    chances = [math.exp(token["logprob"]) for token in tokens]
    classes = page.locator(".tokens .ink").evaluate_all("all => all.map((e) => e.className.split(' ')[1])")

    assert len(tokens) > 4
    assert classes == [f"p{next(bin for bin, low in enumerate(bounds) if chance >= low)}" for chance in chances]
    strengths = [
        page.locator(f".legend .p{bin}").evaluate("e => getComputedStyle(e).backgroundColor")
        for bin in range(len(bounds))
    ]
    assert len(set(strengths)) == len(bounds)
    expect(page.locator(".legend")).to_be_visible()


def test_a_token_shows_its_alternatives_by_keyboard_and_pointer(server: Server, visit: Visit) -> None:
    """One tab stop, arrows move, the popover lists the alternatives by probability, Escape closes it."""
    page = visit(server).page
    ask(page, "Alternatives", seed="3", max_tokens="24", top_logprobs="7")
    strip = page.locator(".tokens")
    strip.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")

    expect(page.locator("#popover")).to_be_visible()
    assert strip.get_attribute("aria-activedescendant") == page.locator(".t[aria-selected=true]").get_attribute("id")
    shares = page.locator("#popover td:last-child").all_inner_texts()
    values = [float(share.strip("<").removesuffix("%")) for share in shares]
    assert len(values) == 7
    assert values == sorted(values, reverse=True)
    page.keyboard.press("Escape")
    expect(page.locator("#popover")).to_be_hidden()
    page.locator(".t .ink").nth(3).hover()
    expect(page.locator("#popover")).to_be_visible()


def test_every_control_reaches_the_request(server: Server, visit: Visit) -> None:
    """What is set in the form is in the body, under the API's names, with its type; what is not set is not sent."""
    watched = visit(server)
    page = watched.page
    open_all(page)
    values: dict[str, tuple[str, Any]] = {
        "temperature": ("0.7", 0.7),
        "top_p": ("0.9", 0.9),
        "top_k": ("40", 40),
        "min_p": ("0.01", 0.01),
        "typical_p": ("0.95", 0.95),
        "seed": ("9223372036854775807", "9223372036854775807"),
        "max_tokens": ("8", 8),
        "min_tokens": ("2", 2),
        "stop": ("zz\\n\nEND", ["zz\n", "END"]),
        "stop_token_ids": ("7, 9", [7, 9]),
        "time_limit_ms": ("20000", 20000),
        "top_logprobs": ("3", 3),
        "top_p_decay": ("0.9", 0.9),
        "top_p_floor": ("0.3", 0.3),
        "top_p_reset_token_ids": ("11", [11]),
        "presence_penalty": ("0.1", 0.1),
        "frequency_penalty": ("0.2", 0.2),
        "repetition_penalty": ("1.1", 1.1),
        "no_repeat_ngram": ("3", 3),
        "bad_words": ("damn", ["damn"]),
        "logit_bias": ('{"42": -100}', {"42": -100}),
        "priority": ("1", 1),
        "queue_timeout_ms": ("30000", 30000),
    }
    for name, (typed, _) in values.items():
        page.fill(f"#p-{name}", typed)
    page.check("#p-ignore_eos")
    page.check("#p-bypass_cache")
    page.fill("#system", "Be brief.")
    ask(page, "All of it")
    path, body = watched.bodies[-1]

    assert path == "/v1/chat/completions"
    assert body.pop("messages") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "All of it"},
    ]
    assert body.pop("model") == page.locator("#model").input_value()
    assert body == {
        **{name: value for name, (_, value) in values.items()},
        "ignore_eos": True,
        "bypass_cache": True,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expect(page.locator(".failure")).to_have_count(0)


def test_a_plain_request_sends_no_parameters(server: Server, visit: Visit) -> None:
    """Unset means unset: an untouched form sends only what makes it a stream with colours."""
    watched = visit(server)
    ask(watched.page, "Plain", wait=False)
    watched.page.locator(".turn.assistant.streaming .t").first.wait_for()
    watched.page.keyboard.press("Escape")

    assert set(watched.bodies[-1][1]) == {"model", "messages", "logprobs", "top_logprobs", "stream", "stream_options"}


def test_a_click_hits_what_it_aims_at_while_another_field_has_the_focus(server: Server, visit: Visit) -> None:
    """Losing the focus moves nothing. Seen red with hints that opened under their fields and closed on the press."""
    page = visit(server).page
    page.focus("#p-temperature")
    before = page.locator("#p-ignore_eos").bounding_box()
    page.click("#p-ignore_eos")

    assert page.locator("#p-ignore_eos").bounding_box() == before
    expect(page.locator("#p-ignore_eos")).to_be_checked()


def test_R11_violations_are_shown_beside_their_fields(server: Server, visit: Visit) -> None:
    """Every broken rule stands beside its field, the card has the code and the id of the response's header."""
    page = visit(server).page
    with page.expect_response("**/v1/chat/completions") as caught:
        ask(page, "Wrong", temperature="101", top_p="0", top_k="many")
    error = caught.value.json()["error"]

    for name in ("temperature", "top_p", "top_k"):
        message = next(item["message"] for item in error["details"] if item["field"] == name)
        expect(page.locator(f"#p-{name}-wrong")).to_have_text(message)
        assert page.locator(f"#p-{name}").get_attribute("aria-invalid") == "true"
    expect(page.locator(".error-code")).to_have_text(error["code"])
    expect(page.locator(".request-id")).to_have_text(caught.value.header_value("x-request-id") or "missing")
    expect(page.locator("#p-temperature")).to_be_focused()
    page.fill("#p-temperature", "1")
    expect(page.locator("#p-temperature-wrong")).to_be_hidden()


def test_a_schema_that_is_no_json_is_refused_beside_its_field(server: Server, visit: Visit) -> None:
    """Nothing is sent, the message stands beside the box, and the text to send is kept."""
    watched = visit(server)
    page = watched.page
    page.click("summary:has-text('Constraint')")
    page.select_option("#p-constraint", "json_schema")
    page.fill("#p-constraint-text", "{not json")
    ask(page, "Hi", wait=False)

    expect(page.locator("#p-constraint-wrong")).to_contain_text("must be JSON")
    expect(page.locator("#prompt")).to_have_value("Hi")
    assert watched.bodies == []


def test_a_constraint_holds(server: Server, visit: Visit) -> None:
    """The answer is one of the lines of the constraint box."""
    watched = visit(server)
    page = watched.page
    page.click("summary:has-text('Constraint')")
    page.select_option("#p-constraint", "choice")
    page.fill("#p-constraint-text", "oak\nelm")
    ask(page, "Which tree?", max_tokens="16")

    assert watched.bodies[-1][1]["constraint"] == {"choice": ["oak", "elm"]}
    assert shown_answer(page) in {"oak", "elm"}


def test_completion_mode_continues_a_text(server: Server, visit: Visit) -> None:
    """Raw completion posts the text as it is, and its answer can be carried on from."""
    watched = visit(server)
    page = watched.page
    page.check("input[name=mode][value=completion]")
    ask(page, "Once upon", temperature="0", max_tokens="12")
    path, body = watched.bodies[-1]
    answer = shown_answer(page)
    page.click("button:has-text('Continue from here')")

    assert path == "/v1/completions"
    assert (body["prompt"], body["logprobs"]) == ("Once upon", 5)
    expect(page.locator("#prompt")).to_have_value("Once upon" + answer)


def test_a_conversation_sends_what_was_said(server: Server, visit: Visit) -> None:
    """The second message carries the first and its answer; Try again replaces the last answer; Clear forgets all."""
    watched = visit(server)
    page = watched.page
    ask(page, "First", max_tokens="6", seed="2")
    first = shown_answer(page)
    ask(page, "Second")
    messages = watched.bodies[-1][1]["messages"]

    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == first
    page.locator("button:has-text('Try again')").last.click()
    page.locator(".turn.assistant.streaming").wait_for(state="detached")
    assert watched.bodies[-1][1]["messages"] == messages
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)


def test_S7_text_is_never_read_as_markup(server: Server, visit: Visit) -> None:
    """A message full of markup is shown as its characters and makes no element."""
    page = visit(server).page
    text = '<img src=x onerror="alert(1)"><b>bold</b>'
    ask(page, text, max_tokens="4")

    expect(page.locator(".turn.user .said")).to_have_text(text)
    assert page.locator(".turn img, .turn b").count() == 0


def test_everything_works_with_the_keyboard_alone(server: Server, visit: Visit) -> None:
    """Type, send, stop, inspect, and reach every control with Tab; what has the focus is always outlined."""
    page = visit(server).page
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("Keys only")
    page.keyboard.press("Enter")
    page.locator(".turn.assistant.streaming .t").first.wait_for()
    page.keyboard.press("Escape")
    page.locator(".turn.assistant.streaming").wait_for(state="detached")
    reached: list[str] = []
    unmarked: list[str] = []
    for _ in range(120):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUSED)
        if name == "prompt":
            break
        # After the last control the focus leaves the page once, and comes back at its top.
        if name != "BODY":
            reached.append(name)
            unmarked += [] if outline else [name]

    wanted = {"send", "clear", "model", "mode", "tokens", "p-temperature", "p-seed", "p-stop", "p-logprobs", "system"}
    assert wanted <= set(reached)
    assert {"snippet", "copy-snippet"} <= set(reached)
    assert unmarked == []


def test_controls_have_names_and_answers_are_announced(server: Server, visit: Visit) -> None:
    """Every control has an accessible name; a screen reader hears the answer politely, in sentences, and its end."""
    page = visit(server).page
    open_all(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")].filter((e) => !(e.labels?.length
        || e.getAttribute("aria-label") || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    ask(page, "Speak", max_tokens="20")

    assert nameless == []
    assert page.locator("#announce").get_attribute("aria-live") == "polite"
    expect(page.locator("#announce")).to_contain_text("Answer complete")


def test_a_phone_shows_everything_without_scrolling_sideways(server: Server, visit: Visit) -> None:
    """At 360 px nothing is wider than the screen: conversation, error, parameters with every group open, reference."""
    watched = visit(server, width=360, height=740)
    page = watched.page
    page.click("#show-side")
    open_all(page)
    page.fill("#p-max_tokens", "60")
    page.check("#p-ignore_eos")

    assert overflow(page) == 0
    page.click("#hide-side")
    ask(page, "a" * 300)
    assert overflow(page) == 0
    page.click("#show-side")
    page.fill("#p-temperature", "-1")
    page.click("#hide-side")
    ask(page, "error")
    expect(page.locator(".failure")).to_be_visible()
    assert overflow(page) == 0
    page.goto(server.origin + "/docs")
    page.locator(".operation").first.wait_for()
    assert overflow(page) == 0


def test_pages_carry_the_policy_and_hold_it(server: Server, visit: Visit) -> None:
    """Every page comes with the strict policy and has no inline script or style. Violations fail every test."""
    for path in ("/", "/jobs", "/docs"):
        watched = visit(server, path, goto=False)
        response = watched.page.goto(server.origin + path)

        assert response is not None
        policy = {
            name: set(rest) for name, *rest in map(str.split, response.headers["content-security-policy"].split(";"))
        }
        assert policy == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert watched.page.evaluate("document.querySelectorAll('style, script:not([src]), [style]').length") == 0


def test_the_header_shows_load_and_rests_while_hidden(server: Server, visit: Visit) -> None:
    """Load is polled while the page is visible and not at all while it is hidden."""
    watched = visit(server, goto=False)
    page = watched.page
    polls: list[str] = []
    page.on("request", lambda request: polls.append(request.url) if request.url.endswith("/metrics") else None)
    page.clock.install()
    page.goto(server.origin + "/")
    expect(page.locator("#ready")).to_have_attribute("data-state", "up")
    page.clock.run_for(10_000)
    expect(page.locator("#vital-waiting")).to_have_text("0")
    visible = len(polls)
    page.evaluate(
        """() => { Object.defineProperty(document, "hidden", {value: true, configurable: true});
        document.dispatchEvent(new Event("visibilitychange")) }"""
    )
    page.clock.run_for(100)
    hidden = len(polls)
    page.clock.run_for(60_000)

    assert visible >= 2
    assert len(polls) == hidden


def test_themes_follow_the_system_and_are_legible(server: Server, visit: Visit) -> None:
    """Light and dark differ, and text in both has a contrast of at least 4.5 (WCAG AA)."""
    grounds = []
    for scheme in ("light", "dark"):
        page = visit(server, scheme=scheme).page
        ask(page, "Contrast", max_tokens="8")
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ratios = page.evaluate(
            CONTRAST, [".said", ".who", ".notes", ".hint-line", ".help", ".vitals dt", ".row > label", ".quiet"]
        )
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}

    assert grounds[0] != grounds[1]
