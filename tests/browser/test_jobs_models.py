"""What a job made, tried on its page: answers before and after side by side, and what an encoder finds in a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from browser.jobs_site import TENANT, Run, Site, posted
from browser.pages import Watched
from playwright.sync_api import expect
from tiny_adapters import tiny_adapter
from tiny_tasks import tiny_task

from trilithon_parallel.config import load_config
from trilithon_parallel.lora.peft import read_adapter
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.catalog import Catalog, CatalogEntry
from trilithon_server.engine.identity import model_digest
from trilithon_server.text.template import load_template, template_digest

Visit = Callable[..., Watched]


def adapter_of(site: Site, run: Run, folder: Path) -> None:
    """Let the run succeed, with a random adapter as what it made."""
    job = site.worker.succeeded(run.claim)
    path = tiny_adapter(folder / "adapter", site.model, seed=1)
    template = load_template(site.model)
    assert template is not None
    entry = CatalogEntry(
        name=job.name, kind="adapter", base=site.model.name, base_digest=model_digest(site.model), path=path,
        digest=read_adapter(path, config=load_config(site.model)).digest, tenant=TENANT, task=job.task, job_id=job.id,
        step=100, template_digest=template_digest(template, load_tokenizer(site.model)),
    )  # fmt: skip
    Catalog(site.jobs.paths.models).register(entry)


def test_E3_before_and_after_are_what_each_model_says(site: Site, show: Visit, tmp_path: Path) -> None:
    """
    The same prompt goes to both models; each answer is the one that a plain request gets; an alias is moved.

    Seen red with the base asked twice.
    """
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
    """
    Entities stand where the server says, also behind a letter of two units; the text itself is unchanged.

    Seen red with offsets in UTF-16 units.
    """
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
