/** What the pages of tasks have in common: a form, what came of it beside it, and one request at a time. */

import { Api, ApiError } from "./api.js";
import { byId, h } from "./dom.js";
import { failureCard } from "./failure.js";
import { asNumber } from "./params.js";
import { showReadiness } from "./ready.js";

const READY_MS = 4000;

export class TaskPage {
  api = new Api();
  #fields = new Map(); // the server's name -> {input, wrong}
  #controller = null;
  #onModels;

  /** `onModels` gets the served models each time that they were read. */
  constructor({ onModels }) {
    this.#onModels = onModels;
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.api.key = byId("key").value;
      this.loadModels();
    });
    document.addEventListener("keydown", ({ key }) => key === "Escape" && this.stop());
    document.addEventListener("visibilitychange", () => this.#watch());
    byId("ask").addEventListener("input", ({ target }) => this.#clearWrong(target));
  }

  /** Read the models, and watch the server's readiness from now on. Whether it let the models be read. */
  async start() {
    byId("stop").addEventListener("click", () => this.stop());
    this.#watch();
    return this.loadModels();
  }

  async #watch() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    await showReadiness(this.api);
    this.timer = setTimeout(() => this.#watch(), READY_MS);
  }

  async loadModels() {
    try {
      const { data } = await this.api.json("/v1/models");
      byId("failure").replaceChildren();
      await this.#onModels(data);
      return true;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.fail(error);
      return false;
    }
  }

  // The form -------------------------------------------------------------------------------------------------

  /** A field of the request: `name` is what the server calls it, so that what is wrong with it stands beside it. */
  field(name, label, input, { hint = "" } = {}) {
    const id = `ask-${name.replaceAll(".", "-")}`;
    input.id = id;
    return this.#frame(name, id, h("label", { for: id }, label), input, hint);
  }

  /** The same of several controls in one element. */
  group(name, label, element, { hint = "" } = {}) {
    const id = `ask-${name.replaceAll(".", "-")}`;
    element.setAttribute("role", "group");
    element.setAttribute("aria-labelledby", `${id}-label`);
    return this.#frame(name, id, h("span", { class: "label", id: `${id}-label` }, label), element, hint);
  }

  #frame(name, id, label, input, hint) {
    const wrong = h("p", { class: "wrong", id: `${id}-wrong`, role: "alert" });
    input.setAttribute("aria-describedby", hint ? `${id}-hint ${id}-wrong` : `${id}-wrong`);
    this.#fields.set(name, { input, wrong });
    return h("div", { class: "field" }, label, input, hint ? h("p", { class: "field-hint", id: `${id}-hint` }, hint) : null, wrong);
  }

  number(name, label, unset) {
    return this.field(name, label, h("input", { type: "text", inputmode: "decimal", placeholder: unset, spellcheck: "false" }));
  }

  /** What is typed into fields, by name; an empty one is left out, and the server's default holds. */
  values(...names) {
    const typed = names.map((name) => [name, this.#fields.get(name).input.value.trim()]);
    return Object.fromEntries(typed.filter(([, text]) => text !== "").map(([name, text]) => [name.split(".").at(-1), asNumber(text)]));
  }

  text(name) {
    return this.#fields.get(name).input.value;
  }

  #clearWrong(target) {
    for (const { input, wrong } of this.#fields.values()) {
      if (input !== target && !input.contains?.(target)) continue;
      wrong.textContent = "";
      input.removeAttribute("aria-invalid");
    }
  }

  /**
   * Show broken rules beside their fields, "knowledge.documents[0].text" beside the longest name that it begins with,
   * "max_tokens" also beside "sampling.max_tokens".
   */
  #place(details) {
    const rest = [];
    for (const violation of details) {
      const path = violation.field ?? "";
      const names = [...this.#fields.keys()].filter((name) => path === name || path.startsWith(`${name}.`) || path.startsWith(`${name}[`) || name.endsWith(`.${path}`));
      const found = this.#fields.get(names.sort((a, b) => b.length - a.length)[0]);
      if (!found) {
        rest.push(violation);
        continue;
      }
      found.wrong.textContent = violation.message;
      found.input.setAttribute("aria-invalid", "true");
    }
    return rest;
  }

  // The request ----------------------------------------------------------------------------------------------

  get busy() {
    return this.#controller !== null;
  }

  stop() {
    this.#controller?.abort();
  }

  /**
   * Do what takes a while; `act` gets a signal that Stop and Esc set. Shows what it is refused or fails at.
   * Returns "done", "stopped", "failed", or "busy" where something else is under way.
   */
  async run(act) {
    if (this.#controller) return "busy";
    for (const { input } of this.#fields.values()) this.#clearWrong(input);
    byId("failure").replaceChildren();
    this.#controller = new AbortController();
    this.#showBusy(true);
    try {
      await act(this.#controller.signal);
      return "done";
    } catch (error) {
      if (error.name === "AbortError") return "stopped";
      if (!(error instanceof ApiError)) throw error;
      this.fail(error);
      return "failed";
    } finally {
      this.#controller = null;
      this.#showBusy(false);
    }
  }

  fail(error) {
    const unplaced = this.#place(error.details);
    byId("failure").replaceChildren(failureCard(error, { unplaced }));
    if (error.status === 401 || error.status === 403) {
      byId("key-form").hidden = false;
      byId("key").focus();
    }
  }

  #showBusy(busy) {
    const hadFocus = document.activeElement;
    byId("go").hidden = busy;
    byId("stop").hidden = !busy;
    // The button that had the focus is gone: keep the keyboard where it was.
    if (busy && hadFocus === byId("go")) byId("stop").focus();
    if (!busy && hadFocus === byId("stop")) byId("go").focus();
  }
}

/** A select of models that can do something; `first` is an option before them, or null. */
export function chooseModel(select, models, capability, first = null) {
  const names = models.filter(({ capabilities }) => capabilities?.includes(capability)).map(({ id }) => id);
  const chosen = select.value;
  const options = names.map((name) => h("option", { value: name }, name));
  if (first !== null) options.unshift(h("option", { value: "" }, first));
  select.replaceChildren(...(options.length ? options : [h("option", { value: "" }, "no model")]));
  if (names.includes(chosen)) select.value = chosen;
}

/** "prompt 120 (64 cached), 31 tokens" of a task's usage, by pieces. */
export function usageFacts(usage) {
  const facts = [];
  if (usage?.prompt_tokens) facts.push(`prompt ${usage.prompt_tokens}${usage.cached_tokens ? ` (${usage.cached_tokens} cached)` : ""}`);
  const written = usage?.generated_tokens;
  if (written) facts.push(`${written} token${written === 1 ? "" : "s"}`);
  return facts;
}
