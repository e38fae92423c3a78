/**
 * Every parameter of a request as one table; the form, the request body and the place of each validation message come
 * from it. An empty field is not sent: unset means the server's default, which is what the placeholder shows. What is
 * typed is sent as it is, so the server alone decides what is valid.
 */

import { byId, fit, h } from "./dom.js";

const number = (name, unset, hint, { slider = null, wide = false } = {}) => ({ name, kind: "number", unset, hint, slider, wide });
const toggle = (name, hint) => ({ name, kind: "toggle", hint });
const lines = (name, hint) => ({ name, kind: "lines", unset: "", hint });
const ids = (name, hint) => ({ name, kind: "ids", unset: "", hint });

export const GROUPS = [
  {
    title: "Sampling",
    open: true,
    fields: [
      number("temperature", "1", "0 is greedy; up to 100", { slider: [0, 2, 0.05] }),
      number("top_p", "1", "Keep the most likely tokens up to this mass", { slider: [0.05, 1, 0.05] }),
      number("top_k", "off", "Keep the k most likely tokens; 0 is off"),
      number("min_p", "0", "Drop tokens below this share of the best one", { slider: [0, 1, 0.01] }),
      number("typical_p", "1", "Keep tokens of typical information content"),
      number("seed", "drawn", "The same seed gives the same answer, in any batch", { wide: true }),
    ],
  },
  {
    title: "Length and stops",
    open: true,
    fields: [
      number("max_tokens", "1024", "Longest answer"),
      number("min_tokens", "0", "End tokens are masked until then"),
      lines("stop", "One per line; \\n stands for a line break"),
      ids("stop_token_ids", "Token ids, separated by commas"),
      toggle("ignore_eos", "Go on after the model's end token"),
      number("time_limit_ms", "server cap", "Ends the answer with what there is by then", { wide: true }),
    ],
  },
  {
    title: "Token probabilities",
    open: true,
    fields: [
      { name: "logprobs", kind: "toggle", hint: "Colour each token by its probability", on: true },
      number("top_logprobs", "5", "Alternatives per token, up to 20"),
      { name: "echo", kind: "toggle", hint: "Show the prompt's own tokens and probabilities too", only: "completion" },
    ],
  },
  {
    title: "Factual nucleus",
    fields: [
      number("top_p_decay", "off", "top_p shrinks by this factor at each token; needs top_p below 1"),
      number("top_p_floor", "0", "and never below this"),
      ids("top_p_reset_token_ids", "Tokens that restore top_p; unset: sentence ends"),
    ],
  },
  {
    title: "Penalties and words",
    fields: [
      number("presence_penalty", "0", "-2 to 2; once per generated token"),
      number("frequency_penalty", "0", "-2 to 2; per occurrence"),
      number("repetition_penalty", "1", "above 0, to 10; counts the prompt too"),
      number("no_repeat_ngram", "0", "Forbid repeating n-grams of this length"),
      lines("bad_words", "One per line; never generated"),
      { name: "logit_bias", kind: "json", unset: '{"42": -100}', hint: "Token id to -100..100; -100 bans" },
      ids("allowed_token_ids", "Only these tokens, separated by commas"),
    ],
  },
  {
    title: "Constraint",
    fields: [
      {
        name: "constraint",
        kind: "constraint",
        hint: "The answer can only be text that this admits",
      },
    ],
  },
  {
    title: "Scheduling",
    fields: [
      number("priority", "0", "-10 to 10, larger first"),
      number("queue_timeout_ms", "60000", "Longest wait for a place in a batch", { wide: true }),
      toggle("bypass_cache", "Neither read nor fill the prefix cache"),
    ],
  },
];

const CONSTRAINTS = {
  "": "none",
  json_schema: "JSON schema",
  json_object: "any JSON object",
  regex: "regular expression",
  choice: "one of these lines",
  grammar: "grammar (Lark)",
};

const EXAMPLES = {
  json_schema: '{\n  "type": "object",\n  "properties": {\n    "city": {"type": "string"},\n    "people": {"type": "integer"}\n  },\n  "required": ["city", "people"],\n  "additionalProperties": false\n}',
  regex: "(yes|no), because .{10,80}\\.",
  choice: "yes\nno\nmaybe",
  grammar: 'start: "a" | "b" start',
};

/** "12" -> 12; what is not a number stays text, and the server says what is wrong with it. */
export function asNumber(text) {
  const trimmed = text.trim();
  const value = Number(trimmed);
  // Above 2^53 a JavaScript number loses digits; the server takes a string of digits for seeds.
  if (trimmed === "" || !Number.isFinite(value) || Math.abs(value) > Number.MAX_SAFE_INTEGER) return trimmed;
  return value;
}

const splitIds = (text) => text.split(/[\s,]+/).filter(Boolean).map(asNumber);
const unescape = (line) => line.replaceAll(/\\(n|t|\\)/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]);
const splitLines = (text) => text.split("\n").filter((line) => line !== "").map(unescape);

/** A value of the form that cannot be put into JSON at all; shown beside its field without asking the server. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function parseJson(field, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new FieldError(field, `\`${field}\` must be JSON. ${error.message}`);
  }
}

export class ParameterForm {
  #form;
  #rows = new Map();

  constructor(form, { onchange }) {
    this.#form = form;
    for (const group of GROUPS) form.append(this.#group(group));
    form.append(this.#access());
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const type of ["focusin", "pointerover"]) form.addEventListener(type, (event) => this.#hint(event.target));
    this.#hint(form);
    form.addEventListener("input", (event) => {
      this.#mark(event.target.closest("[data-field]"));
      onchange();
    });
  }

  #group({ title, open, fields }) {
    const reset = h("span", { class: "count", "data-count": "" });
    const details = h("details", { open: open ?? false }, h("summary", {}, title, reset));
    for (const field of fields) details.append(this.#row(field));
    return details;
  }

  #row(field) {
    const id = `p-${field.name}`;
    const hint = h("p", { class: "hint", id: `${id}-hint` }, field.hint);
    const message = h("p", { class: "wrong", id: `${id}-wrong`, hidden: true });
    const described = `${id}-hint ${id}-wrong`;
    const common = { id, name: field.name, "aria-describedby": described };
    const label = h("label", { for: id }, field.name);
    let input;
    let extra = null;

    if (field.kind === "toggle") {
      input = h("input", { ...common, type: "checkbox", class: "switch", checked: field.on ?? false });
    } else if (field.kind === "lines" || field.kind === "json") {
      input = h("textarea", { ...common, rows: 1, placeholder: field.unset, spellcheck: "false" });
    } else if (field.kind === "constraint") {
      return this.#constraint(field, label, common, hint, message);
    } else {
      input = h("input", {
        ...common,
        type: "text",
        inputmode: field.kind === "number" ? "decimal" : "text",
        placeholder: field.unset,
        spellcheck: "false",
      });
      if (field.slider) extra = this.#slider(field, input);
    }

    const row = h("div", { class: `row ${field.kind}${field.wide ? " wide" : ""}`, "data-field": field.name }, label, extra, input, hint, message);
    this.#rows.set(field.name, { field, row, input, message, initial: field.on ?? false });
    return row;
  }

  #slider({ name, slider: [min, max, step], unset }, input) {
    const range = h("input", { type: "range", min, max, step, value: unset, "aria-label": `${name} slider`, tabindex: "-1" });
    range.addEventListener("input", () => (input.value = range.value));
    input.addEventListener("input", () => (range.value = input.value === "" ? unset : input.value));
    return range;
  }

  #constraint(field, label, common, hint, message) {
    const select = h("select", common, ...Object.entries(CONSTRAINTS).map(([value, text]) => h("option", { value }, text)));
    const area = h("textarea", {
      id: "p-constraint-text",
      rows: 6,
      hidden: true,
      "aria-label": "constraint text",
      "aria-describedby": "p-constraint-wrong",
      spellcheck: "false",
    });
    select.addEventListener("input", () => {
      const example = EXAMPLES[select.value];
      area.hidden = example === undefined;
      const untouched = area.value === "" || Object.values(EXAMPLES).includes(area.value);
      if (untouched) area.value = example ?? "";
      if (!area.hidden) fit(area);
    });
    const row = h("div", { class: "row constraint", "data-field": field.name }, label, select, area, hint, message);
    this.#rows.set(field.name, { field, row, input: select, area, message, initial: false });
    return row;
  }

  #access() {
    const details = h(
      "details",
      {},
      h("summary", {}, "Access"),
      h(
        "div",
        { class: "row key", "data-field": "api_key" },
        h("label", { for: "p-api_key" }, "API key"),
        h("input", {
          id: "p-api_key",
          type: "password",
          autocomplete: "off",
          placeholder: "none",
          spellcheck: "false",
          "aria-describedby": "p-api_key-hint p-api_key-wrong",
        }),
        h("p", { class: "hint", id: "p-api_key-hint" }, "Kept in this page's memory only; a reload forgets it"),
        h("p", { class: "wrong", id: "p-api_key-wrong", hidden: true }),
      ),
    );
    const [input, message] = [details.querySelector("input"), details.querySelector(".wrong")];
    this.#rows.set("api_key", { field: { name: "api_key", kind: "key" }, row: input.parentElement, input, message, initial: "" });
    return details;
  }

  #hint(target) {
    const entry = this.#rows.get(target.closest("[data-field]")?.dataset.field);
    const hint = entry?.row.querySelector(".hint").textContent;
    if (hint) byId("hint-line").replaceChildren(h("b", {}, entry.field.name), hint);
    else if (!byId("hint-line").hasChildNodes()) byId("hint-line").append("An empty field is not sent. Names are those of the API.");
  }

  /** Bold what is set, count it beside its group, and drop the message of a field that is being corrected. */
  #mark(row) {
    const entry = row && this.#rows.get(row.dataset.field);
    if (!entry) return;
    row.classList.toggle("set", this.#isSet(entry));
    this.#wrong(entry, null);
    const group = row.closest("details");
    const count = group.querySelectorAll(".row.set").length;
    const badge = group.querySelector("[data-count]");
    if (badge) badge.textContent = count ? `${count} set` : "";
  }

  #isSet({ field, input }) {
    if (field.kind === "toggle") return input.checked !== (field.on ?? false);
    return input.value.trim() !== "";
  }

  #wrong({ input, area, message }, text) {
    message.hidden = text === null;
    message.textContent = text ?? "";
    for (const control of [input, area]) {
      if (!control) continue;
      if (text === null) control.removeAttribute("aria-invalid");
      else control.setAttribute("aria-invalid", "true");
    }
  }

  /** Show which fields belong to this mode. */
  setMode(mode) {
    for (const { field, row } of this.#rows.values()) row.hidden = field.only !== undefined && field.only !== mode;
    this.#rows.get("max_tokens").input.placeholder = mode === "chat" ? "1024" : "16";
  }

  /** Show the served model's own defaults where it has any. */
  setDefaults(defaults) {
    for (const { field, input } of this.#rows.values()) {
      if (field.kind === "number" && field.name !== "max_tokens") input.placeholder = String(defaults?.[field.name] ?? field.unset);
    }
  }

  /** The parameters that were set, as they go into the request body of this mode. */
  collect(mode) {
    const body = {};
    for (const entry of this.#rows.values()) {
      const { field, input } = entry;
      if (!["number", "toggle", "lines", "ids", "json"].includes(field.kind)) continue;
      if (["logprobs", "top_logprobs"].includes(field.name)) continue;
      if (field.only !== undefined && field.only !== mode) continue;
      if (!this.#isSet(entry)) continue;
      if (field.kind === "toggle") body[field.name] = input.checked;
      else if (field.kind === "number") body[field.name] = asNumber(input.value);
      else if (field.kind === "lines") body[field.name] = splitLines(input.value);
      else if (field.kind === "ids") body[field.name] = splitIds(input.value);
      else body[field.name] = parseJson(field.name, input.value);
    }
    this.#collectLogprobs(mode, body);
    this.#collectConstraint(body);
    return body;
  }

  #collectLogprobs(mode, body) {
    if (!this.#rows.get("logprobs").input.checked) return;
    const typed = this.#rows.get("top_logprobs").input.value;
    const count = typed.trim() === "" ? 5 : asNumber(typed);
    if (mode === "chat") Object.assign(body, { logprobs: true, top_logprobs: count });
    else body.logprobs = count;
  }

  #collectConstraint(body) {
    const { input, area } = this.#rows.get("constraint");
    const text = area.value;
    if (input.value === "json_schema") {
      const schema = parseJson("constraint", text);
      body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
    } else if (input.value === "json_object") {
      body.response_format = { type: "json_object" };
    } else if (input.value === "choice") {
      body.constraint = { choice: text.split("\n").filter(Boolean) };
    } else if (input.value !== "") {
      body.constraint = { [input.value]: text };
    }
  }

  /**
   * Put each violation beside its field; open the groups that hold one. Returns those that no field of the form
   * stands for. `details` is the list of an error body.
   */
  showViolations(details) {
    const rest = [];
    let first = null;
    for (const violation of details) {
      const entry = this.#rows.get(this.#fieldOf(violation.field ?? ""));
      if (!entry) {
        rest.push(violation);
        continue;
      }
      this.#wrong(entry, violation.message);
      entry.row.closest("details").open = true;
      first ??= entry;
    }
    return { rest, first: first?.input ?? null };
  }

  clearViolations() {
    for (const entry of this.#rows.values()) this.#wrong(entry, null);
  }

  /** "stop[2]" -> "stop", "response_format.json_schema" -> "constraint". */
  #fieldOf(path) {
    const base = path.match(/^[a-z_]+/)?.[0] ?? "";
    if (base === "response_format") return "constraint";
    if (base === "max_completion_tokens") return "max_tokens";
    return base;
  }

  get apiKeyInput() {
    return this.#rows.get("api_key").input;
  }
}
