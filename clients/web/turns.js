/** One turn of the conversation as a piece of page: what was said, what the answer cost, what went wrong. */

import { copyText, h, seconds } from "./dom.js";
import { failureCard } from "./failure.js";
import { legend, TokenStrip } from "./tokens.js";

const SENTENCE_END = /[.!?\n]["')\]]?\s/g;

/** Hand whole sentences to a polite live region: token by token nobody could listen. */
export class Announcer {
  #region;
  #pending = "";

  constructor(region) {
    this.#region = region;
  }

  add(text) {
    this.#pending += text;
    const ends = [...this.#pending.matchAll(SENTENCE_END)];
    const end = ends.length ? ends.at(-1).index + ends.at(-1)[0].length : 0;
    if (end >= 24) this.#flush(end);
  }

  finish(summary) {
    this.#flush(this.#pending.length);
    this.#say(summary);
  }

  #flush(end) {
    this.#say(this.#pending.slice(0, end).trim());
    this.#pending = this.#pending.slice(end);
  }

  #say(text) {
    if (!text) return;
    this.#region.append(h("p", {}, text));
    while (this.#region.children.length > 40) this.#region.firstChild.remove();
  }
}

export function userTurn(text, { role = "user" } = {}) {
  return h("li", { class: `turn ${role}` }, h("h3", { class: "who" }, role), h("div", { class: "said" }, text));
}

/** An answer while it grows and after. */
export class AnswerTurn {
  text = "";
  #plain = h("div", { class: "said" });
  #strip = null;
  #body = h("div", { class: "body" }, this.#plain);
  #notes = h("p", { class: "notes" });
  #legend = legend();
  #queue = [];
  #frame = 0;

  constructor(role, { grew, prefix = "" }) {
    this.grew = grew;
    this.#legend.hidden = true;
    this.element = h(
      "li",
      { class: `turn assistant streaming${prefix ? " flow" : ""}`, "aria-busy": "true" },
      h("h3", { class: "who" }, role),
      prefix ? h("div", { class: "said given" }, prefix) : null,
      this.#body,
      h("div", { class: "foot" }, this.#legend, this.#notes),
    );
  }

  /** `tokens` is null where the request asked for no probabilities. */
  add(text, tokens) {
    this.text += text;
    this.#queue.push([text, tokens]);
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  get numTokens() {
    return this.#strip?.length ?? 0;
  }

  #useStrip() {
    if (this.#strip) return;
    this.#strip = new TokenStrip("Answer, token by token. Arrow keys move.");
    if (this.text === "") this.#plain.remove();
    this.#body.append(this.#strip.element);
    this.#legend.hidden = false;
  }

  #paint() {
    this.#frame = 0;
    const plain = [];
    for (const [text, tokens] of this.#queue) {
      if (tokens === null && !this.#strip) plain.push(text);
      else {
        this.#useStrip();
        this.#plain.remove();
        this.#strip.append(text, tokens ?? []);
      }
    }
    this.#queue = [];
    if (plain.length) this.#plain.append(plain.join(""));
    this.grew();
  }

  /** Paint what is still waiting; the answer grows no further. */
  settle() {
    if (this.#frame) cancelAnimationFrame(this.#frame);
    this.#paint();
    this.element.classList.remove("streaming");
    this.element.removeAttribute("aria-busy");
  }

  /** `facts` are short strings; `actions` are [label, what to do] pairs. */
  finish({ facts, actions }) {
    this.settle();
    const buttons = actions.map(([label, act]) => h("button", { type: "button", class: "quiet", onclick: act }, label));
    const copy = h("button", { type: "button", class: "quiet", onclick: () => copyText(this.text, copy) }, "Copy");
    this.#notes.replaceChildren(...facts.map((fact) => h("span", {}, fact)), ...(this.text ? [copy] : []), ...buttons);
    this.grew();
  }

  /** The perplexity of the tokens that carry a probability, or null. */
  get perplexity() {
    if (!this.#strip) return null;
    const { sum, count } = this.#strip.score;
    return count ? Math.exp(-sum / count) : null;
  }

  fail(error, { actions, unplaced }) {
    this.settle();
    if (!this.text) this.#body.remove();
    this.element.append(failureCard(error, { actions, unplaced }));
    this.grew();
  }
}

/** The small print under an answer. */
export function factsOf({ finish, constrained, detail, usage, numTokens, ttft, duration, perplexity, fingerprint }) {
  const generated = usage?.completion_tokens ?? numTokens;
  const facts = [finish];
  if (generated) facts.push(`${generated} token${generated === 1 ? "" : "s"}`);
  if (usage?.prompt_tokens) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    facts.push(`prompt ${usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}`);
  }
  if (ttft !== null) facts.push(`TTFT ${seconds(ttft)}`);
  if (ttft !== null && generated > 1 && duration > ttft) facts.push(`${((generated - 1) / (duration - ttft)).toFixed(1)} tok/s`);
  if (perplexity !== null) facts.push(`perplexity ${perplexity.toFixed(2)}`);
  if (detail?.seed !== undefined && detail?.seed !== null) facts.push(`seed ${detail.seed}`);
  if (detail?.matched_stop) facts.push(`stop ${JSON.stringify(detail.matched_stop)}`);
  if (constrained && detail?.constraint_complete === false) facts.push("constraint not complete");
  if (fingerprint) facts.push(fingerprint);
  return facts;
}
