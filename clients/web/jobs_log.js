/** The events of a job as a log that grows at its end, in a box whose size does not change. */

import { h } from "./dom.js";
import { clockMs } from "./jobs_words.js";

const MOST = 500;

/** Kinds that are not lines: a step is a point of the curves. */
const QUIET = new Set(["step", "prepare_progress"]);

export class EventLog {
  #list = h("ol", { class: "events", tabindex: "0", "aria-label": "Events" });
  #state = h("span", { class: "stream-state", role: "status" }, "connecting");
  #waiting = [];
  #frame = 0;

  constructor() {
    this.element = h("section", { class: "card log-card" }, h("h3", {}, "Events ", this.#state), this.#list);
  }

  add(event) {
    if (QUIET.has(event.kind)) return;
    this.#waiting.push(event);
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  /** "live", "over", or the error that cut the stream. */
  set state(state) {
    const words = typeof state === "string" ? state : state.again ? `${state.message} Trying again.` : state.message;
    this.#state.dataset.state = typeof state === "string" ? state : "cut";
    if (this.#state.textContent !== words) this.#state.textContent = words;
  }

  close() {
    cancelAnimationFrame(this.#frame);
  }

  #paint() {
    this.#frame = 0;
    const list = this.#list;
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    list.append(
      ...this.#waiting.slice(-MOST).map((event) =>
        h(
          "li",
          { class: `event ${event.level}` },
          h("time", { datetime: new Date(event.created_at_ms).toISOString() }, clockMs(event.created_at_ms)),
          h("code", {}, event.kind),
          h("span", {}, event.message),
        ),
      ),
    );
    this.#waiting = [];
    while (list.children.length > MOST) list.firstChild.remove();
    // Follow only a reader who is at the end.
    if (atEnd) list.scrollTop = list.scrollHeight;
  }
}
