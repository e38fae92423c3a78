/** The chosen job: built once, then changed in place by its events and by what the server says of it. */

import { ApiError } from "./api.js";
import { Chart } from "./chart.js";
import { h } from "./dom.js";
import { failureCard } from "./failure.js";
import { Compare } from "./jobs_compare.js";
import { follow, pause } from "./jobs_follow.js";
import { EventLog } from "./jobs_log.js";
import { estimateBox, facts, reportBox } from "./jobs_report.js";
import { ALLOWED, bytes, clock, flat, share, standing } from "./jobs_words.js";
import { short } from "./scales.js";

/** Between two looks at the job while its events come. */
const REFRESH_MS = 2000;
const METRICS_PAGE = 10000;

export class JobView {
  #api;
  #id;
  #path;
  #onJob;
  #abort = new AbortController();
  #job = null;
  #reported = false;
  #known = ""; // the checkpoints on the page, as the server told them
  #stale = new Set(["job", "checkpoints", "models"]);
  #wake = () => {};

  #title = h("h1");
  #state = h("span", { class: "state" });
  #facts = h("p", { class: "job-line" });
  #bar = h("progress", { max: 1, value: 0, "aria-label": "Steps done" });
  #standing = h("p", { class: "standing" });
  #problem = h("div", { class: "problem" });
  #said = h("p", { class: "said-back", role: "status" });
  #alias = h("input", { type: "text", id: "alias", placeholder: "alias", spellcheck: "false", size: 12 });
  #buttons = {};
  #metadata = h("dl", { class: "metadata" });
  #checkpoints = h("tbody");
  #verdict = h("span", { class: "count" });
  #report = h("div");
  #reportCard = h("details", { class: "card", id: "report" }, h("summary", {}, "Data report", this.#verdict), this.#report);
  #estimate = h("div", {}, h("p", { class: "faint" }, "After validation."));
  #settings = h("div");
  #log = new EventLog();
  #chart = new Chart("Loss, learning rate and throughput by step");
  #compare;

  /** `onJob` gets the job each time that it was read. */
  constructor(api, id, { onJob }) {
    this.#api = api;
    this.#id = id;
    this.#path = `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
    this.#onJob = onJob;
    this.#compare = new Compare(api);
    for (const verb of ["pause", "resume", "cancel"]) {
      const label = verb[0].toUpperCase() + verb.slice(1);
      this.#buttons[verb] = h("button", { type: "button", class: "plain", id: verb, disabled: true, onclick: () => this.#ask(verb) }, label);
    }
    this.#buttons.cancel.addEventListener("blur", () => this.#unsure());
    this.#buttons.deploy = h("button", { type: "submit", class: "plain", id: "deploy", disabled: true }, "Deploy");
    const deploy = h("form", { class: "deploy", autocomplete: "off" }, h("label", { class: "sr", for: "alias" }, "Alias"), this.#alias, this.#buttons.deploy);
    deploy.addEventListener("submit", (event) => { event.preventDefault(); this.#deploy(); });
    const { pause, resume, cancel } = this.#buttons;
    this.element = h(
      "article",
      { class: "job" },
      h("header", { class: "job-head" }, h("div", { class: "job-title" }, this.#title, this.#state), this.#facts, this.#metadata),
      h("div", { class: "status-box" }, this.#bar, this.#standing, this.#problem),
      h("div", { class: "actions" }, pause, resume, cancel, deploy, this.#said),
      h("section", { class: "card" }, h("h3", {}, "Curves"), this.#chart.element),
      h("div", { class: "pair" }, this.#log.element, this.#checkpointCard()),
      this.#compare.element,
      this.#reportCard,
      h("details", { class: "card", id: "estimate" }, h("summary", {}, "Estimate"), this.#estimate),
      h("details", { class: "card", id: "settings" }, h("summary", {}, "Settings"), this.#settings),
    );
    this.#title.textContent = id;
  }

  #checkpointCard() {
    const head = h("thead", {}, h("tr", {}, ...["step", "numbers", "size", "served as"].map((name) => h("th", { scope: "col" }, name))));
    return h("section", { class: "card" }, h("h3", {}, "Checkpoints"), h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Checkpoints" }, h("table", { class: "checkpoints" }, head, this.#checkpoints)));
  }

  /** Read and follow until `close`. Errors of reading the job itself go to `onFailure`. */
  async start({ onFailure }) {
    const { signal } = this.#abort;
    this.#follow(signal);
    while (!signal.aborted) {
      let wait = REFRESH_MS;
      try {
        if (this.#stale.delete("job")) await this.#readJob(signal);
        if (this.#stale.delete("checkpoints")) await this.#readCheckpoints(signal);
        if (this.#stale.delete("models")) await this.#compare.readModels(signal);
        onFailure(null);
      } catch (error) {
        if (error.name === "AbortError") return;
        if (!(error instanceof ApiError)) throw error;
        this.#stale.add("job").add("checkpoints");
        onFailure(error);
        if ([401, 403, 404].includes(error.status)) return;
        wait = Math.max(3 * REFRESH_MS, 1000 * Number(error.retryAfter));
      }
      await pause(wait, signal);
      if (!this.#stale.size && !signal.aborted) await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  /** The job as somebody else has read it. */
  take(job) {
    if (job.id === this.#id) this.#show(job);
  }

  close() {
    this.#abort.abort();
    this.#wake();
    this.#chart.close();
    this.#log.close();
    this.#compare.close();
  }

  // Reading --------------------------------------------------------------------------------------------------

  #refresh(...what) {
    for (const item of what) this.#stale.add(item);
    this.#wake();
  }

  async #follow(signal) {
    // The whole series first: events of steps are thinned once they are many.
    await this.#readMetrics(signal);
    await follow(this.#api, this.#id, {
      signal,
      onEvent: (event) => this.#onEvent(event),
      onState: (state) => {
        this.#log.state = state;
        if (state !== "live") this.#refresh("job", "checkpoints");
      },
    });
  }

  async #readMetrics(signal) {
    let after = 0;
    try {
      for (let more = true; more; ) {
        const { data, has_more: hasMore } = await this.#api.json(`${this.#path}/metrics?limit=${METRICS_PAGE}&after_step=${after}`, { signal });
        for (const { step, ...numbers } of data) this.#chart.add(step, numbers);
        more = hasMore && data.length > 0;
        after = data.at(-1)?.step ?? after;
      }
    } catch (error) {
      // Nothing is lost for good: the events bring the numbers too, and say what is wrong.
      if (error.name !== "AbortError" && !(error instanceof ApiError)) throw error;
    }
  }

  #onEvent(event) {
    this.#log.add(event);
    const { step, ...numbers } = event.data;
    if (["step", "eval"].includes(event.kind) && Number.isInteger(step)) {
      this.#chart.add(step, numbers);
      if (event.kind === "step") this.#chart.attempt(event.attempt, step);
    }
    this.#refresh("job", ...(/^(checkpoint|verified|deployed|succeeded)/.test(event.kind) ? ["checkpoints", "models"] : []));
  }

  async #readJob(signal) {
    const job = await this.#api.json(this.#path, { signal });
    this.#show(job);
    const { state } = job.trilithon;
    if (!this.#reported && state !== "validating") {
      this.#reported = true;
      await this.#readReport(signal);
    }
  }

  async #readReport(signal) {
    try {
      const report = await this.#api.json(`${this.#path}/report`, { signal });
      this.#verdict.textContent = report.summary ?? "";
      this.#report.replaceChildren(reportBox(report));
      this.#reportCard.open ||= report.ok === false;
    } catch (error) {
      if (error.status !== 404) {
        this.#reported = false;
        throw error;
      }
      this.#report.replaceChildren(h("p", { class: "faint" }, "The data was not read."));
    }
  }

  async #readCheckpoints(signal) {
    const all = [];
    for (let more = true; more; ) {
      const after = all.length ? `&after=${encodeURIComponent(all.at(-1).id)}` : "";
      const page = await this.#api.json(`${this.#path}/checkpoints?limit=100${after}`, { signal });
      all.push(...page.data);
      more = page.has_more;
    }
    this.#chart.checkpoints = all.map(({ step_number: step }) => step);
    const row = ({ step_number: step, fine_tuned_model_checkpoint: model, trilithon }) => {
      const numbers = Object.entries(trilithon.metrics).map(([name, value]) => `${name.replaceAll("_", " ")} ${short(value)}`);
      const marks = [trilithon.verified ? "verified" : "", trilithon.servable ? "" : "removed"].filter(Boolean);
      const deploy = trilithon.servable ? h("button", { type: "button", class: "quiet", onclick: () => this.#deploy(step), "aria-label": `Deploy step ${step}` }, "Deploy") : null;
      return h(
        "tr", {},
        h("th", { scope: "row" }, String(step)), h("td", {}, numbers.join(", ")), h("td", {}, bytes(trilithon.bytes)),
        h("td", {}, h("code", {}, model), ...marks.map((mark) => h("span", { class: "mark" }, mark)), deploy),
      );
    };
    // Rows that say what they said before stay: a button of theirs may have the focus.
    const words = JSON.stringify(all);
    if (words === this.#known) return;
    this.#known = words;
    this.#checkpoints.replaceChildren(...(all.length ? all.map(row) : [h("tr", {}, h("td", { colspan: 4, class: "faint" }, "None yet."))]));
  }

  // Showing --------------------------------------------------------------------------------------------------

  #show(job) {
    const { trilithon, error } = job;
    const { state, progress } = trilithon;
    const before = this.#job;
    // Answers may overtake one another: what is older than what is shown stays unseen.
    if (before && trilithon.last_seq < before.trilithon.last_seq) return;
    this.#job = job;
    this.#title.textContent = trilithon.name;
    this.#state.textContent = state;
    this.#state.dataset.state = state;
    const lines = [trilithon.task, job.model, `attempt ${trilithon.attempt}`, `seed ${job.seed}`, `created ${clock(job.created_at)}`];
    if (job.finished_at) lines.push(`ended ${clock(job.finished_at)}`);
    this.#facts.replaceChildren(...lines.map((line) => h("span", {}, line)));
    this.#bar.value = share(job);
    const pace = state === "running" && progress.tokens_per_second ? `, ${short(progress.tokens_per_second)} tokens/s` : "";
    const epoch = progress.epoch ? `, epoch ${progress.epoch.toFixed(2)}` : "";
    this.#standing.textContent = `${standing(job)}${epoch}${pace}`;
    if (JSON.stringify(error) !== JSON.stringify(before?.error ?? null)) this.#showError(trilithon.error);
    for (const [verb, states] of Object.entries(ALLOWED)) this.#buttons[verb].disabled = !states.has(state);
    if (!before) this.#showOnce(job);
    if (trilithon.estimate && !before?.trilithon.estimate) this.#estimate.replaceChildren(estimateBox(trilithon.estimate));
    if (!before || (trilithon.resolved && !before.trilithon.resolved)) this.#showSettings(trilithon);
    this.#compare.show(job);
    this.#onJob(job);
  }

  #showOnce({ metadata, trilithon }) {
    this.#metadata.replaceChildren(...Object.entries(metadata).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    this.#alias.value = trilithon.config.deploy.alias ?? "";
  }

  #showError(error) {
    if (!error) this.#problem.replaceChildren();
    else {
      const whose = { user: "", infra: "A matter of the machine. ", internal: "A fault of the software. " }[error.kind];
      const card = h("div", { class: "failure", role: "alert" }, h("p", { class: "failure-head" }, h("code", { class: "error-code" }, error.code)), h("p", { class: "failure-text" }, whose, error.message), error.hint ? h("p", { class: "notes" }, error.hint) : null);
      this.#problem.replaceChildren(card);
    }
  }

  #showSettings({ config, resolved }) {
    const given = new Map(flat(config));
    const rows = flat(resolved ?? config).map(([name, value]) => {
      const chosen = resolved && value !== null && (given.get(name) ?? null) === null;
      return [name, h("span", {}, h("code", {}, JSON.stringify(value)), chosen ? h("span", { class: "mark" }, "chosen by the task or the data") : null)];
    });
    this.#settings.replaceChildren(facts(rows));
  }

  // Asking ---------------------------------------------------------------------------------------------------

  async #ask(verb) {
    const button = this.#buttons[verb];
    if (verb === "cancel" && !button.dataset.sure) {
      button.dataset.sure = "true";
      button.textContent = "Really cancel";
      button.focus(); // until it loses the focus
      return;
    }
    this.#unsure();
    await this.#do(async () => {
      this.#show(await this.#api.json(`${this.#path}/${verb}`, { method: "POST" }));
      return { pause: "It will pause after a checkpoint.", resume: "It goes on.", cancel: "It is being cancelled." }[verb];
    });
  }

  #unsure() {
    delete this.#buttons.cancel.dataset.sure;
    this.#buttons.cancel.textContent = "Cancel";
  }

  /** Point the alias to the result, or to the checkpoint of a step. */
  async #deploy(step) {
    await this.#do(async () => {
      const { model, alias, previous } = await this.#api.post(`${this.#path}/deploy`, { alias: this.#alias.value.trim(), step });
      return `${alias} is now ${model}${previous ? `; it was ${previous}` : ""}.`;
    });
  }

  async #do(work) {
    try {
      this.#said.replaceChildren(await work());
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.#said.replaceChildren(failureCard(error));
    }
  }
}
