"""The page of finetuning jobs in a real browser, against a real server with jobs. As for every page, each test also
ends with: no request left the origin, no script failed, the content security policy was never broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser.jobs_site import SLOW_KEY, TENANT, Site, enter_key, posted, row, rows
from browser.pages import CONTRAST, FOCUSED, Server, Watched
from playwright.sync_api import expect

from trilithon_finetune.errors import JobError

Visit = Callable[..., Watched]
MARKUP = '<img src=x onerror="alert(1)"><b>bold</b>'


def test_the_list_tells_how_far_each_job_is(site: Site, show: Visit) -> None:
    """A row has state, task, model, steps, the server's estimate of the time left, and the sentence of an error."""
    running, failing, waiting = site.run(suffix="runs", task="lm"), site.run(suffix="fails"), site.job(suffix="waits")
    running.step(25, 2.5)
    failing.failed(JobError(code="nan_loss", message="The loss is not a number at step 7."))
    page = show().page

    expect(row(page, running.job)).to_contain_text("runs")
    expect(row(page, running.job)).to_contain_text(f"lm, {site.model.name}")
    expect(row(page, running.job).locator(".state")).to_have_text("running")
    expect(row(page, running.job).locator(".job-note")).to_have_text("step 25 of 100, 3 min 45 s left")
    assert row(page, running.job).locator("progress").evaluate("e => e.value") == 0.25
    expect(row(page, failing.job).locator(".job-note")).to_have_text("The loss is not a number at step 7.")
    expect(row(page, waiting).locator(".state")).to_have_text("validating")
    running.step(50, 2.0)
    expect(row(page, running.job).locator(".job-note")).to_have_text("step 50 of 100, 2 min 30 s left")
    site.jobs.cancel(waiting.id, tenant=TENANT)


def test_older_jobs_are_listed_when_asked_for(site: Site, show: Visit) -> None:
    """The newest twenty come first; the button brings those behind them."""
    made = [site.job(suffix=f"many-{index}") for index in range(21)]
    page = show().page
    expect(row(page, made[-1])).to_be_visible()
    expect(row(page, made[0])).to_have_count(0)
    page.click("#older")

    expect(row(page, made[0])).to_be_visible()
    names = page.locator(".job-name").all_inner_texts()
    assert names[:21] == [f"many-{index}" for index in reversed(range(21))]
    for job in made:
        site.jobs.cancel(job.id, tenant=TENANT)


def test_a_file_is_uploaded_and_told_what_is_wrong_with_it(site: Site, show: Visit, tmp_path: Path) -> None:
    """Findings come by line; of good rows the page shows what the model sees, with what it learns marked."""
    good = {"messages": [{"role": "user", "content": "Who built it?"}, {"role": "assistant", "content": "We did."}]}
    bad = {"messages": [{"role": "user", "content": "hi"}, {"role": "asistant", "content": MARKUP}]}
    file = tmp_path / "chats.jsonl"
    file.write_bytes(rows(good, bad, {**good, "extra": MARKUP}))
    page = show("new").page
    page.set_input_files("#file", file)
    page.click("#upload")

    expect(page.locator(".verdict")).to_contain_text("No job may train on this file.")
    role = page.locator(".finding.error", has_text='"asistant"')
    expect(role.locator(".place")).to_have_text("chats.jsonl:2")
    expect(role).to_contain_text("messages[1].role")
    lines = [
        int(place.rpartition(":")[2]) for place in page.locator(".finding .place").all_inner_texts() if ":" in place
    ]
    assert lines == sorted(lines)
    expect(page.locator(".example").first).to_contain_text("Who built it?")
    expect(page.locator(".example").first.locator("mark.learned")).to_contain_text("We did.")
    expect(page.locator(".example").first.locator("mark.learned")).not_to_contain_text("Who")
    expect(page.locator("#new-training_file option:checked")).to_contain_text("chats.jsonl")
    assert page.locator("#detail img, #detail b").count() == 0


def test_a_job_is_created_as_the_form_says(site: Site, show: Visit) -> None:
    """
    Fields and the JSON box become one request; what is wrong stands beside its field, before and after sending.

    Seen red where the field silently won over the box.
    """
    file = site.job(b"{}\n", name="mine.jsonl")
    site.jobs.cancel(file.id, tenant=TENANT)
    watched = show("new")
    page = watched.page
    expect(page.locator("#new-training_file")).to_contain_text("mine.jsonl")
    page.select_option("#new-training_file", file.training_file)
    page.fill("#new-suffix", "made")
    page.fill("#new-trilithon-training-epochs", "2")
    page.fill("#new-trilithon-optimizer-lr", "0.001")
    more, wrong = page.locator("#new-more"), page.locator("#new-more-wrong")
    for text, said in (
        ("{nope", "must be JSON"),
        ("[1]", "must be a JSON object"),
        ('{"data": {"a:\\"{": 1, "b": {"a:\\"{": 1}, "a:\\"{": 2}}', "comes twice in one object"),
        ('{"model": "x"}', "`model` has a field above"),
        ('{"training": {"epochs": 3}}', "`training.epochs` is set above already"),
    ):
        more.fill(text)
        page.click("#create")
        expect(wrong).to_contain_text(said)
    assert posted(watched, "/v1/fine_tuning/jobs") == []
    more.fill('{"data": {"max_token": 8}}')
    page.click("#create")
    expect(wrong).to_contain_text('Did you mean "max_tokens"?')
    expect(more).to_be_focused()
    more.fill('{"data": {"max_tokens": 64}, "seed": 7, "metadata": {"for": "tests"}}')
    page.click("#create")

    expect(page.locator("#detail h1")).to_have_text(re.compile(rf"ft:{site.model.name}:made:"))
    job = site.jobs.list(tenant=TENANT, limit=1).data[0]
    assert page.url.endswith(f"#{job.id}")
    expect(row(page, job)).to_have_attribute("aria-current", "true")
    assert posted(watched, "/v1/fine_tuning/jobs")[-1] == {
        "model": site.model.name,
        "training_file": file.training_file,
        "suffix": "made",
        "seed": 7,
        "metadata": {"for": "tests"},
        "trilithon": {
            "task": "sft",
            "training": {"epochs": 2},
            "optimizer": {"lr": 0.001},
            "data": {"max_tokens": 64},
        },
    }
    assert (job.config["training"]["epochs"], job.config["seed"]) == (2, 7)
    site.jobs.cancel(job.id, tenant=TENANT)


def test_a_job_is_paused_resumed_and_cancelled(site: Site, show: Visit) -> None:
    """
    The buttons reach the worker: the job rests after a checkpoint, goes on, and ends; cancelling asks twice.

    Seen red where the first click cancels.
    """
    job = site.job(options={"steps": 100_000, "step_s": 0.05, "every": 1_000_000})
    with site.working(job.id):
        page = show(job.id).page
        state = page.locator("#detail .job-title .state")
        expect(state).to_have_text("running")
        expect(page.locator("#resume")).to_be_disabled()
        page.click("#pause")
        expect(state).to_have_text("paused")
        expect(page.locator(".checkpoints tbody th")).to_have_count(1)
        expect(page.locator("#pause")).to_be_disabled()
        page.click("#resume")
        expect(state).to_have_text("running")
        page.click("#cancel")
        expect(page.locator("#cancel")).to_have_text("Really cancel")
        page.focus("#pause")
        expect(page.locator("#cancel")).to_have_text("Cancel")
        page.click("#cancel")
        page.click("#cancel")
        expect(state).to_have_text("cancelled")
        expect(page.locator("#cancel")).to_be_disabled()
        expect(row(page, job).locator(".state")).to_have_text("cancelled")
        expect(page.locator(".stream-state")).to_have_text("over")


def test_S7_what_others_wrote_is_never_read_as_markup(site: Site, show: Visit) -> None:
    """
    Metadata, events, errors, findings and examples full of markup are shown as their characters.

    Seen red with events set as HTML.
    """
    finding = {"code": "E-DATA-012", "severity": "error", "file": MARKUP, "line": 1, "path": MARKUP,
               "message": MARKUP, "hint": MARKUP}  # fmt: skip
    example = {"line": 1, "pieces": [{"text": MARKUP, "learned": False}, {"text": MARKUP, "learned": True}]}
    report = {"ok": False, "rows": 1, "errors": 1, "warnings": 0, "summary": MARKUP, "format": MARKUP,
              "labels": [MARKUP], "findings": [finding], "examples": [example]}  # fmt: skip
    run = site.run(report=report, metadata={MARKUP: MARKUP}, options={MARKUP: MARKUP})
    run.tell("warning", MARKUP)
    run.step(1, 1.0)
    run.failed(JobError(code="bug", message=MARKUP, hint=MARKUP))
    page = show(run.job.id).page
    expect(page.locator(".problem .failure-text")).to_contain_text(MARKUP)
    expect(page.locator(".events")).to_contain_text(MARKUP)
    page.evaluate("document.querySelectorAll('details').forEach((group) => (group.open = true))")

    expect(page.locator(".metadata")).to_contain_text(MARKUP)
    expect(page.locator(".finding").first).to_contain_text(MARKUP)
    expect(page.locator(".example mark")).to_have_text(MARKUP)
    expect(page.locator("#settings")).to_contain_text("onerror")
    expect(row(page, run.job).locator(".job-note")).to_contain_text(MARKUP)
    assert page.locator("#detail img, #list img, #detail b:not(.readout b)").count() == 0
    assert page.locator(".mark", has_text="chosen").count() == 1  # training.epochs


def test_S3_the_key_is_asked_for_and_kept_in_memory_only(site: Site, visit: Visit) -> None:
    """A wrong key is told, a right one works at once, and a reload forgets it."""
    run = site.run()
    page = visit(site.server, f"/jobs#{run.job.id}").page
    page.fill("#key", "sk-wrong")
    page.press("#key", "Enter")
    expect(page.locator("#list-note")).to_contain_text("not known here")
    enter_key(page)
    expect(page.locator("#detail h1")).to_have_text(run.job.name)

    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]
    page.reload()
    expect(page.locator("#key")).to_have_value("")
    expect(page.locator("#list-note")).to_contain_text("no API key was given")


def test_what_the_server_refuses_is_told(site: Site, show: Visit, visit: Visit) -> None:
    """A job that is not there has a card; too many requests are waited out; what was shown stays."""
    run = site.run()
    page = show("ftjob-00000000000000000000").page
    expect(page.locator("#detail .error-code")).to_have_text("job_not_found")
    page.evaluate(f"location.hash = '{run.job.id}'")
    expect(page.locator("#detail h1")).to_have_text(run.job.name)
    slow = visit(site.server, "/jobs").page
    slow.fill("#key", SLOW_KEY)
    slow.press("#key", "Enter")

    expect(row(slow, run.job)).to_be_visible()
    expect(slow.locator("#list-note")).to_contain_text("Trying again")
    expect(slow.locator("#ready")).to_have_attribute("data-state", "wait")
    expect(row(slow, run.job)).to_be_visible()
    # No key of this server lacks the scope: what is under test is the page's answer to a refusal.
    refusal = {"error": {"code": "user_scope_required", "message": "this key has the scopes admin."}}
    page.route("**/v1/fine_tuning/jobs?limit=20", lambda route: route.fulfill(status=403, json=refusal))
    expect(page.locator("#list-note")).to_have_text("this key has the scopes admin.")
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#detail h1")).to_have_text(run.job.name)


def test_a_server_without_jobs_says_how_to_turn_them_on(server: Server, visit: Visit) -> None:
    """The page is there, asks no further, and names the flag."""
    page = visit(server, "/jobs").page

    expect(page.locator("#detail")).to_contain_text("trilithon serve MODEL --jobs")
    expect(page.locator("#new")).to_be_hidden()
    page.goto(server.origin + "/")
    page.click("nav >> text=Finetuning")
    expect(page.locator("h2", has_text="Jobs")).to_be_visible()


def test_everything_works_with_the_keyboard_alone(site: Site, show: Visit) -> None:
    """Every control is reached with Tab and outlined when it has the focus; every control has a name."""
    run = site.run()
    run.step(1, 1.0)
    page = show(run.job.id).page
    expect(page.locator("#pause")).to_be_enabled()
    row(page, run.job).focus()
    reached: set[str] = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(FOCUSED)
        if name == "BODY":
            break
        assert outlined, name
        reached.add(name)

    assert {"pause", "cancel", "alias", "chart", "events", "scroll", "SUMMARY"} <= reached
    page.keyboard.press("Shift+Tab")
    page.click("#new")
    expect(page.locator("#new-model option")).not_to_have_count(0)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, progress")].filter((e) =>
        !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_and_a_phone(scheme: str, site: Site, show: Visit) -> None:
    """Nothing is wider than a phone, and text in both themes has a contrast of at least 4.5 (WCAG AA)."""
    run = site.run(metadata={"a": "b" * 80})
    run.step(1, 2.0, lr=1e-4, tokens_per_second=9.0)
    run.step(2, 1.0, lr=1e-4, tokens_per_second=9.0)
    run.saved(2, valid_loss=1.0)
    page = show(run.job.id, scheme=scheme, width=360, height=740).page
    expect(page.locator(".checkpoints tbody th")).to_have_text("2")
    page.evaluate("document.querySelectorAll('details').forEach((group) => (group.open = true))")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

    assert page.evaluate(wide) == 0
    names = [".job-name", ".job-facts", ".job-note", ".state", ".job-line", ".standing", ".event time", ".readout span"]
    for name in names:  # some come with the events, a moment after the rest
        expect(page.locator(name).first).to_be_attached()
    ratios = page.evaluate(CONTRAST, names)
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    page.evaluate("location.hash = 'new'")
    expect(page.locator("#new-model option")).not_to_have_count(0)
    assert page.evaluate(wide) == 0
