/** The list of jobs: rows that are changed in place, so the focus and the scroll position stay where they are. */

import { h } from "./dom.js";
import { clock, FINAL, share, standing } from "./jobs_words.js";

class Row {
  #name = h("span", { class: "job-name" });
  #state = h("span", { class: "state" });
  #facts = h("span", { class: "job-facts" });
  #bar = h("progress", { max: 1, value: 0, "aria-label": "Steps done" });
  #note = h("span", { class: "job-note" });

  constructor(id) {
    this.link = h(
      "a",
      { class: "job-row", href: `#${id}` },
      h("span", { class: "job-top" }, this.#name, this.#state), this.#facts, this.#bar, this.#note,
    );
    this.element = h("li", {}, this.link);
  }

  show(job) {
    const { trilithon, error } = job;
    say(this.#name, job.trilithon.config.suffix || job.id.slice(-8));
    say(this.#state, trilithon.state);
    this.#state.dataset.state = trilithon.state;
    say(this.#facts, `${trilithon.task}, ${job.model}, ${clock(job.created_at)}`);
    this.#bar.value = share(job);
    say(this.#note, error ? error.message : standing(job));
    this.#note.classList.toggle("bad", Boolean(error));
    this.live = !FINAL.has(trilithon.state);
  }
}

/** Change text only where it is another: a screen reader speaks again otherwise. */
function say(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

export class JobList {
  #rows = new Map(); // id -> Row, in the order of the page
  #list;

  constructor(list) {
    this.#list = list;
  }

  get isEmpty() {
    return this.#rows.size === 0;
  }

  get lastId() {
    return [...this.#rows.keys()].at(-1) ?? "";
  }

  /** Whether any job on the page may still move. */
  get live() {
    return [...this.#rows.values()].some(({ live }) => live);
  }

  /** The newest jobs, as the server lists them; those that are new stand before the known ones. */
  showNewest(jobs) {
    for (const job of jobs.toReversed()) this.#put(job, { first: true });
  }

  showOlder(jobs) {
    for (const job of jobs) this.#put(job, { first: false });
  }

  /** A job that is on the page may have moved; one that is not stays away. */
  update(job) {
    this.#rows.get(job.id)?.show(job);
  }

  #put(job, { first }) {
    let row = this.#rows.get(job.id);
    if (!row) {
      row = new Row(job.id);
      this.#rows = first ? new Map([[job.id, row], ...this.#rows]) : this.#rows.set(job.id, row);
      this.#list[first ? "prepend" : "append"](row.element);
    }
    row.show(job);
  }

  choose(id) {
    for (const [key, { link }] of this.#rows) {
      if (key === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  clear() {
    this.#rows.clear();
    this.#list.replaceChildren();
  }
}
