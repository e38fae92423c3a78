"""The live curves and events of a job in a real browser, over cuts of the line too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.jobs_site import KEY, TENANT, Site, Wire, enter_key, points
from browser.pages import Server, Watched
from playwright.sync_api import Request, expect

from trilithon_finetune.plot import ticks

Visit = Callable[..., Watched]


def test_the_curves_grow_while_events_arrive(site: Site, show: Visit) -> None:
    """
    Each event is a point, drawn as it came; checkpoints and new attempts are marked; nothing on the page moves.

    Seen red with a line that grew above the curves, and with the gap closed.
    """
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
    expect(state).to_have_text("live")
    wire.freeze()
    page.clock.run_for(46_000)
    expect(state).to_contain_text("Trying again")
    wire.mend()
    page.clock.run_for(20_000)

    expect(state).to_have_text("live")


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
    """
    Ticks are those of `plot.svg`; thinning keeps the ends and the extremes of every pixel column, in order.

    Seen red without the greatest.
    """
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


_WATCH_SHIFTS = """() => {
  window.shifts = [];
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
      window.shifts.push([entry.value, ...entry.sources.map(({ node }) => node?.className ?? node?.nodeName)]);
    }
  }).observe({ type: "layout-shift" });
}"""
