"""The page of finetuning jobs in a real browser, against a real server with jobs. As for every page, each test also
ends with: no request left the origin, no script failed, the content security policy was never broken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.jobs_site import (
    KEY,
    KEYS,
    PATIENCE_MS,
    SLOW_KEY,
    TENANT,
    Run,
    Site,
    Wire,
    enter_key,
    posted,
    rows,
)
from browser.pages import CONTRAST, FOCUSED, Server, Watched, serve
from playwright.sync_api import Page, Request, expect
from served import free_ports
from tiny_adapters import tiny_adapter
from tiny_tasks import tiny_task

from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.plot import ticks
from trilithon_parallel.config import load_config
from trilithon_parallel.lora.peft import read_adapter
from trilithon_server.catalog import Catalog, CatalogEntry
from trilithon_server.engine.startup import model_digest
from trilithon_server.text.template import load_template

Visit = Callable[..., Watched]
MARKUP = '<img src=x onerror="alert(1)"><b>bold</b>'


@pytest.fixture(scope="module")
def served_site(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("jobs")
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(KEYS)
    flags = ("--api-keys-file", str(keys), "--public-ui", "--jobs", str(folder / "store"), "--set", "jobs.slots=0")
    first, second = free_ports(2)
    with serve(model_dir, (first, second), folder / "server.log", *flags, key=KEY) as server:
        jobs = Jobs(None, StorePaths(folder / "store"))
        yield Site(server, jobs, model_dir)
        jobs.close()


@pytest.fixture
def site(served_site: Site) -> Iterator[Site]:
    """The server with jobs; what a test has left running is ended behind it."""
    yield served_site
    served_site.end()


@pytest.fixture
def wire(site: Site) -> Iterator[Wire]:
    """A connection to the server that can be cut."""
    relay = Wire(int(site.server.origin.rpartition(":")[2]))
    yield relay
    relay.close()


@pytest.fixture
def show(site: Site, visit: Visit) -> Callable[..., Watched]:
    """A function that opens the page, at a job or a form, and gives it the key."""

    def open_page(at: str = "", *, server: Server | None = None, **options: Any) -> Watched:
        watched = visit(server or site.server, f"/jobs{'#' if at else ''}{at}", **options)
        watched.page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        enter_key(watched.page)
        return watched

    yield open_page
    expect.set_options(timeout=5_000)


def row(page: Page, job: Job) -> Any:
    """A job's row in the list."""
    return page.locator(f".job-row[href='#{job.id}']")


def points(page: Page, column: str) -> int:
    """Points of a curve's line."""
    d = page.locator(f"path.curve.{column}").last.get_attribute("d") or ""
    return len(re.findall(r"[ML]", d))


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


def test_the_curves_grow_while_events_arrive(site: Site, show: Visit) -> None:
    """Each event is a point, drawn as it came; checkpoints and new attempts are marked; nothing on the page moves."""
    run = site.run()
    for step in range(1, 6):
        run.step(step, 3.0 / step, lr=1e-4, tokens_per_second=500.0)
    page = show(run.job.id).page
    expect(page.locator(".readout b")).to_have_text("step 5")
    expect(page.locator("#detail .job-title .state")).to_have_text("running")
    expect(page.locator(".checkpoints tbody")).to_contain_text("None yet.")
    assert points(page, "train_loss") == 5
    page.evaluate(_WATCH_SHIFTS)
    for step in range(6, 31):
        run.step(step, None if step == 20 else 3.0 / step, lr=1e-4, tokens_per_second=500.0)
    run.tell("eval", "Step 30: valid_loss 0.5", step=30, valid_loss=0.5)
    run.saved(30, valid_loss=0.5)

    expect(page.locator(".readout b")).to_have_text("step 30")
    expect(page.locator(".readout")).to_contain_text("validation 0.5")
    expect(page.locator(".readout")).to_contain_text("training 0.1")
    expect(page.locator(".checkpoints tbody th")).to_have_text("30")
    expect(page.locator(".checkpoints tbody")).to_contain_text("3.0 MiB")
    expect(page.locator("#chart-desc")).to_contain_text("training loss: 3 at step 1, 0.1 at step 30.")
    expect(page.locator("path.checkpoint")).to_have_count(2)  # the mark and its legend
    assert points(page, "train_loss") == 29
    assert (page.locator("path.curve.train_loss").last.get_attribute("d") or "").count("M") == 2  # a gap at step 20
    expect(page.locator(".standing")).to_contain_text("step 30 of 100, 3 min 30 s left")
    assert page.locator("path.attempt").count() == 0
    assert page.evaluate("window.shifts") == []


def test_a_new_attempt_is_marked_where_it_went_on(site: Site, show: Visit) -> None:
    """A dashed line stands at the first step of a later attempt, and a repeated step counts as it was seen last."""
    run = site.run()
    for step in (1, 2, 3, 4):
        run.step(step, 4.0)
    again = site.again(run)
    again.step(3, 2.0)
    again.step(4, 1.0)
    page = show(run.job.id).page
    expect(page.locator(".readout")).to_contain_text("training 1")

    expect(page.locator("path.attempt")).to_have_count(4)  # one in each panel, and the legend's
    assert points(page, "train_loss") == 4
    expect(page.locator("#chart-desc")).to_contain_text("began at step 3.")


def test_events_come_once_each_over_a_cut(site: Site, wire: Wire, show: Visit) -> None:
    """While the server is away the page says so; then it goes on behind the last event. Seen red without the header."""
    run = site.run()
    run.step(1, 3.0)
    run.tell("warning", "before the cut")
    page = show(run.job.id, server=Server(wire.origin, KEY)).page
    expect(page.locator(".events")).to_contain_text("before the cut")
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request) if "/events" in request.url else None)
    events = site.jobs.events(run.job.id, tenant=TENANT)
    wire.cut()
    expect(page.locator(".stream-state")).to_contain_text("Trying again")
    expect(page.locator("#ready")).to_have_attribute("data-state", "down")
    run.tell("warning", "during the cut")
    run.step(2, 2.5)
    wire.mend()

    expect(page.locator(".events")).to_contain_text("during the cut")
    expect(page.locator(".stream-state")).to_have_text("live")
    expect(page.locator("#ready")).to_have_attribute("data-state", "up")
    expect(page.locator(".readout b")).to_have_text("step 2")
    words = page.locator(".event span").all_inner_texts()
    assert (words.count("before the cut"), words.count("during the cut")) == (1, 1)
    seqs = {request.headers.get("last-event-id") for request in asked}
    assert seqs == {str(next(e.seq for e in events if e.message == "before the cut"))}


def test_a_line_that_fell_silent_is_left(site: Site, wire: Wire, visit: Visit) -> None:
    """A connection on which not even the server's sign of life comes counts as cut. Seen red without a limit."""
    run = site.run()
    watched = visit(Server(wire.origin, KEY), f"/jobs#{run.job.id}", goto=False)
    page = watched.page
    page.clock.install()
    page.goto(f"{wire.origin}/jobs#{run.job.id}")
    enter_key(page)
    state = page.locator(".stream-state")
    expect(state).to_have_text("live", timeout=PATIENCE_MS)
    wire.freeze()
    page.clock.run_for(46_000)
    expect(state).to_contain_text("Trying again", timeout=PATIENCE_MS)
    wire.mend()
    page.clock.run_for(20_000)

    expect(state).to_have_text("live", timeout=PATIENCE_MS)


def test_the_curves_are_read_by_pointer_and_keyboard(site: Site, show: Visit) -> None:
    """The read-out tells the numbers of the step under the pointer or the cursor, and of the newest one without."""
    run = site.run()
    for step in range(1, 11):
        run.step(step, step / 10, lr=1e-4)
    run.tell("eval", step=4, valid_loss=0.75)
    page = show(run.job.id).page
    readout = page.locator(".readout")
    expect(readout).to_contain_text("validation 0.75 (step 4)")
    box = page.locator(".chart svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 60, box["y"] + 100)

    expect(readout.locator("b")).to_have_text("step 1")
    expect(readout).to_contain_text("training 0.1")
    expect(page.locator(".cursor .rule")).to_have_count(1)
    page.mouse.move(5, 5)
    expect(readout.locator("b")).to_have_text("step 10")
    page.locator(".chart").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(readout).to_contain_text("training 0.2")
    expect(readout).to_have_attribute("aria-live", "polite")
    page.keyboard.press("Escape")
    expect(readout.locator("b")).to_have_text("step 10")
    assert page.locator(".chart svg").get_attribute("role") == "img"


def test_the_charts_arithmetic_is_that_of_the_picture(site: Site, show: Visit) -> None:
    """Ticks are those of `plot.svg`; thinning keeps the ends and the extremes of every pixel column, in order."""
    ranges = [(0.13, 0.92), (3, 3), (0, 0), (-2.5, 7), (1e-5, 2e-4), (0, 123456), (0.999, 1.001)]
    page = show().page
    ours = page.evaluate("r => import('/static/scales.js').then((m) => r.map(([a, b]) => m.ticks(a, b)))", ranges)

    assert ours == [pytest.approx(ticks(low, high)) for low, high in ranges]
    curve = [[index / 50, (index * 7919 % 1009) / 10] for index in range(5000)]
    kept = page.evaluate("c => import('/static/scales.js').then((m) => m.drawn(c))", curve)
    assert kept == sorted(kept)
    assert len(kept) <= 400
    for column in range(100):
        values = [y for x, y in curve if int(x) == column]
        left = [y for x, y in kept if int(x) == column]
        assert (left[0], left[-1], min(left), max(left)) == (values[0], values[-1], min(values), max(values))


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
    """Fields and the JSON box become one request; what is wrong stands beside its field, before and after sending."""
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
    """The buttons reach the worker: the job rests after a checkpoint, goes on, and ends; cancelling asks twice."""
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
        assert site.get(job).desired != "cancel"
        page.click("#cancel")
        expect(state).to_have_text("cancelled")
        expect(page.locator("#cancel")).to_be_disabled()
        expect(row(page, job).locator(".state")).to_have_text("cancelled")
        expect(page.locator(".stream-state")).to_have_text("over")


def adapter_of(site: Site, run: Run, folder: Path) -> None:
    """Let the run succeed, with a random adapter as what it made."""
    job = site.worker.succeeded(run.claim)
    path = tiny_adapter(folder / "adapter", site.model, seed=1)
    template = load_template(site.model)
    assert template is not None
    entry = CatalogEntry(
        name=job.name, kind="adapter", base=site.model.name, base_digest=model_digest(site.model), path=path,
        digest=read_adapter(path, config=load_config(site.model)).digest, tenant=TENANT, task=job.task, job_id=job.id,
        step=100, template_digest=template.digest,
    )  # fmt: skip
    Catalog(site.jobs.paths.models).register(entry)


def test_E3_before_and_after_are_what_each_model_says(site: Site, show: Visit, tmp_path: Path) -> None:
    """The same prompt goes to both models; each answer is the one that a plain request gets; an alias is moved."""
    run = site.run(suffix="made")
    run.saved(50)
    adapter_of(site, run, tmp_path)
    name = site.get(run.job).name
    watched = show(run.job.id)
    page = watched.page
    expect(page.locator("#after")).to_have_value(name)
    page.fill("#try-prompt", "Hello stones")
    page.fill("#try-max_tokens", "24")
    page.click("#compare")
    page.locator(".answer .notes >> text=tokens").nth(1).wait_for()
    shown = page.locator(".answer .body").all_text_contents()
    bodies = posted(watched, "/v1/chat/completions")
    messages = [{"role": "user", "content": "Hello stones"}]
    plain = [
        site.server.post(
            "/v1/chat/completions", {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}
        )["choices"][0]["message"]["content"]
        for model in (site.model.name, name)
    ]

    assert [body["model"] for body in bodies] == [site.model.name, name]
    assert all(body["messages"] == messages for body in bodies)
    assert shown == plain
    assert shown[0] != shown[1]
    page.fill("#alias", "stones")
    page.click("#deploy")
    expect(page.locator(".said-back")).to_have_text(f"stones is now {name}.")
    page.fill("#alias", "old")
    page.click("[aria-label='Deploy step 50']")
    expect(page.locator(".said-back .failure")).to_contain_text("Checkpoints are, where the job has")
    page.fill("#alias", "No Alias")
    page.click("#deploy")
    expect(page.locator(".said-back .failure")).to_contain_text("alias")


def test_what_an_encoder_finds_is_marked_in_the_text(site: Site, show: Visit, tmp_path: Path) -> None:
    """Entities stand where the server says, also behind a letter of two units; the text itself is unchanged."""
    run = site.run(task="ner")
    job = site.worker.succeeded(run.claim)
    path = tiny_task(tmp_path / "tagger", "ner")
    entry = CatalogEntry(
        name=job.name, kind="model", base=site.model.name, base_digest="b" * 64, path=path, digest="e" * 64,
        tenant=TENANT, task="ner", job_id=job.id,
    )  # fmt: skip
    Catalog(site.jobs.paths.models).register(entry)
    text = "\N{PILL} aspirin inhibits COX-2 in the \N{RABBIT} of many"
    page = show(run.job.id).page
    page.fill("#try-text", text)
    page.click("#compare")
    page.locator(".found").wait_for()
    said = site.server.post("/v1/extract/entities", {"model": job.name, "texts": [text]})["documents"][0]["entities"]
    marks = page.locator("mark.entity").evaluate_all(
        "all => all.map((e) => [e.firstChild.data, e.lastChild.textContent])"
    )

    assert said
    assert marks == [[item["text"], item["type"]] for item in said]
    whole = page.locator(".found").evaluate("e => [...e.childNodes].map((n) => (n.data ?? n.firstChild.data)).join('')")
    assert whole == text


def test_S7_what_others_wrote_is_never_read_as_markup(site: Site, show: Visit) -> None:
    """Metadata, events, errors, findings and examples full of markup are shown as their characters."""
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
    ratios = page.evaluate(CONTRAST, names)
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    page.evaluate("location.hash = 'new'")
    expect(page.locator("#new-model option")).not_to_have_count(0)
    assert page.evaluate(wide) == 0


_WATCH_SHIFTS = """() => {
  window.shifts = [];
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
      window.shifts.push([entry.value, ...entry.sources.map(({ node }) => node?.className ?? node?.nodeName)]);
    }
  }).observe({ type: "layout-shift" });
}"""
