/** A new job: upload and check a data file, choose a model and a task, see what it would take, create it. */

import { ApiError } from "./api.js";
import { h } from "./dom.js";
import { failureCard } from "./failure.js";
import { estimateBox, reportBox } from "./jobs_report.js";
import { bytes, clock } from "./jobs_words.js";
import { asNumber, FieldError } from "./params.js";

const TASKS = {
  sft: "answer in chats or prompts",
  dpo: "prefer one answer to another",
  lm: "go on with texts",
  answer_qa: "answer questions in own words",
  yes_no_maybe: "answer with yes, no or maybe",
  ner: "mark entities",
  relation: "tell how two mentions are related",
  classify: "sort texts into classes",
  span_qa: "find answers in a context",
  mlm: "fill masked words",
  dialogue: "speak as an actor of earlier conversations",
  grounded_dialogue: "speak of what sentences of knowledge say",
  dpr: "find the passages of a question",
  ict: "find the passage of a sentence",
  mss: "find and read what a sentence lost",
  reader_individual: "answer from passages, each read alone",
  reader_joint: "answer from passages, read together",
  answer_gen: "propose answers of a passage",
  question_gen: "ask for an answer",
};

/** Settings with a field of their own; everything else goes through the JSON box. Names are those of the API. */
const SETTINGS = [
  { name: "training.epochs", label: "epochs" },
  { name: "training.batch_size", label: "batch size" },
  { name: "optimizer.lr", label: "learning rate" },
  { name: "tuning.kind", label: "tuning", choices: ["", "lora", "full"] },
  { name: "tuning.rank", label: "LoRA rank", unset: "16" },
  { name: "deploy.alias", label: "alias", unset: "none", text: true },
];

/** What stands beside `trilithon` in a request; the JSON box may have the last ones. */
const ABOVE = ["model", "training_file", "validation_file", "suffix", "task"];
const BESIDE = ["seed", "metadata", "method", "hyperparameters", "integrations"];

/** Merge `from` into `into`, both trees. Throws FieldError where both have a value. */
export function merge(into, from, path = []) {
  for (const [name, value] of Object.entries(from)) {
    const isTree = (node) => node !== null && typeof node === "object" && !Array.isArray(node);
    if (!(name in into)) into[name] = value;
    else if (isTree(into[name]) && isTree(value)) merge(into[name], value, [...path, name]);
    else throw new FieldError("more", `\`${[...path, name].join(".")}\` is set above already. Empty that field, or leave it out here.`);
  }
}

/** A key that an object of this JSON text has twice, or null: `JSON.parse` would take the last one in silence. */
function repeatedKey(text) {
  const open = [];
  let name = "";
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\]:]/g)) {
    if (token === "{" || token === "[") open.push(new Set());
    else if (token === "}" || token === "]") open.pop();
    else if (token !== ":") name = JSON.parse(token);
    else if (open.at(-1).has(name)) return name;
    else open.at(-1).add(name);
  }
  return null;
}

/** The JSON box as an object. Throws FieldError. */
export function parseMore(text) {
  if (!text.trim()) return {};
  let tree;
  try {
    tree = JSON.parse(text);
  } catch (error) {
    throw new FieldError("more", `must be JSON: ${error.message}.`);
  }
  if (tree === null || typeof tree !== "object" || Array.isArray(tree)) throw new FieldError("more", "must be a JSON object.");
  const twice = repeatedKey(text);
  if (twice !== null) throw new FieldError("more", `\`${twice}\` comes twice in one object. Keep one of them.`);
  const taken = ABOVE.find((name) => name in tree);
  if (taken) throw new FieldError("more", `\`${taken}\` has a field above. Leave it out here.`);
  return tree;
}

export class NewJob {
  #api;
  #onCreated;
  #inputs = {}; // the server's name of a field -> its input
  #wrongs = {}; // the same -> where its broken rule is shown
  #file = h("input", { type: "file", id: "file", accept: ".jsonl,.json,.gz,.tsv,.conll,.txt" });
  #upload = h("button", { type: "button", class: "plain", id: "upload", onclick: () => this.#do(this.#upload, () => this.#send()) }, "Upload");
  #check = h("button", { type: "button", class: "plain", id: "check", onclick: () => this.#do(this.#check, () => this.#validate()) }, "Check the file");
  #estimate = h("button", { type: "button", class: "plain", id: "ask-estimate", onclick: () => this.#do(this.#estimate, () => this.#plan()) }, "Estimate");
  #create = h("button", { type: "submit", class: "primary", id: "create" }, "Create job");
  #said = h("div", { class: "said-back", role: "status" });
  #result = h("div", { class: "result", "aria-live": "polite" });
  #lastBody = "";
  #key = "";

  /** `onCreated` gets the job. */
  constructor(api, { onCreated }) {
    this.#api = api;
    this.#onCreated = onCreated;
    const form = h("form", { class: "new-form", autocomplete: "off", novalidate: true }, ...this.#fields());
    form.addEventListener("submit", (event) => { event.preventDefault(); this.#do(this.#create, () => this.#make()); });
    form.addEventListener("input", ({ target }) => this.#clear(target));
    this.#inputs.more.addEventListener("input", () => this.#checkMore());
    this.element = h("article", { class: "job new-job" }, h("header", { class: "job-head" }, h("h1", {}, "New job")), form, this.#said, this.#result);
  }

  #fields() {
    const tasks = Object.entries(TASKS).map(([task, what]) => h("option", { value: task }, `${task}: ${what}`));
    return [
      h("fieldset", {}, h("legend", {}, "Data"), h("div", { class: "field wide" }, h("label", { for: "file" }, "Data file"), h("span", { class: "upload" }, this.#file, this.#upload)),
        this.#field("training_file", "Train on", h("select")), this.#field("validation_file", "Validate on", h("select")), h("div", { class: "field last" }, this.#check)),
      h("fieldset", {}, h("legend", {}, "Job"), this.#field("model", "Model", h("select")), this.#field("trilithon.task", "Task", h("select", {}, ...tasks)),
        this.#field("suffix", "Suffix", h("input", { type: "text", placeholder: "none", spellcheck: "false" })), ...SETTINGS.map((setting) => this.#setting(setting))),
      h("fieldset", {}, h("legend", {}, "Everything else"),
        this.#field("more", "JSON, as the API has it", h("textarea", { rows: 4, spellcheck: "false", placeholder: '{"data": {"max_tokens": 1024}, "seed": 7}' }), "wide")),
      h("div", { class: "actions" }, this.#estimate, this.#create),
    ];
  }

  #setting({ name, label, choices, unset = "chosen by the task" }) {
    const input = choices
      ? h("select", {}, ...choices.map((choice) => h("option", { value: choice }, choice || "chosen by the task")))
      : h("input", { type: "text", placeholder: unset, spellcheck: "false" });
    return this.#field(`trilithon.${name}`, label, input);
  }

  #field(name, label, input, kind = "") {
    const id = `new-${name.replaceAll(".", "-")}`;
    input.id = id;
    input.dataset.field = name;
    input.setAttribute("aria-describedby", `${id}-wrong`);
    this.#inputs[name] = input;
    this.#wrongs[name] = h("p", { class: "wrong", id: `${id}-wrong`, role: "alert" });
    return h("div", { class: `field ${kind}` }, h("label", { for: id }, label), input, this.#wrongs[name]);
  }

  /** Models and files to choose from. Throws ApiError. */
  async load() {
    const [models] = await Promise.all([this.#api.json("/v1/models"), this.#loadFiles("")]);
    const bases = models.data.filter(({ kind }) => ["base", "encoder", "merged"].includes(kind));
    this.#options("model", bases.map(({ id }) => [id, id]));
  }

  async #loadFiles(chosen) {
    const { data } = await this.#api.json("/v1/files?purpose=fine-tune&limit=100");
    const files = data.map(({ id, filename, bytes: size, created_at: at }) => [id, `${filename} (${bytes(size)}, ${clock(at)})`]);
    this.#options("training_file", files.length ? files : [["", "upload a file first"]], chosen);
    this.#options("validation_file", [["", "nothing"], ...files]);
  }

  #options(name, pairs, chosen = "") {
    const select = this.#inputs[name];
    const before = chosen || select.value;
    select.replaceChildren(...pairs.map(([value, label]) => h("option", { value }, label)));
    if (pairs.some(([value]) => value === before)) select.value = before;
  }

  // The request ----------------------------------------------------------------------------------------------

  #value(name) {
    return this.#inputs[name].value.trim();
  }

  /** The body that Create would post now. Throws FieldError. */
  body() {
    const trilithon = { task: this.#value("trilithon.task") };
    for (const { name, choices, text } of SETTINGS) {
      const typed = this.#value(`trilithon.${name}`);
      const [section, field] = name.split(".");
      if (typed) trilithon[section] = { ...trilithon[section], [field]: choices || text ? typed : asNumber(typed) };
    }
    const more = parseMore(this.#inputs.more.value);
    const beside = Object.fromEntries(BESIDE.filter((name) => name in more).map((name) => [name, more[name]]));
    merge(trilithon, Object.fromEntries(Object.entries(more).filter(([name]) => !BESIDE.includes(name))));
    const optional = Object.fromEntries(["validation_file", "suffix"].map((name) => [name, this.#value(name)]).filter(([, value]) => value));
    return { model: this.#value("model"), training_file: this.#value("training_file"), ...optional, ...beside, trilithon };
  }

  async #send() {
    const [file] = this.#file.files;
    if (!file) {
      this.#say("Choose a file first.");
      return;
    }
    this.#say(`Uploading ${file.name}, ${bytes(file.size)}.`);
    const form = new FormData();
    form.append("purpose", "fine-tune"); // before the file, so that the server knows what it is for
    form.append("file", file);
    const stored = await this.#api.upload("/v1/files", form);
    await this.#loadFiles(stored.id);
    await this.#validate();
  }

  async #validate() {
    const id = this.#value("training_file");
    const body = { model: this.#value("model"), task: this.#value("trilithon.task"), max_findings: 100 };
    this.#say(`Checking the file for the task ${body.task}.`);
    const report = await this.#api.post(`/v1/files/${encodeURIComponent(id)}/validate`, body);
    this.#say("");
    this.#result.replaceChildren(h("h3", {}, `Report for the task ${body.task}`), reportBox(report));
  }

  async #plan() {
    const body = this.body();
    this.#say("Estimating.");
    const estimate = await this.#api.post("/v1/fine_tuning/estimate", body);
    this.#say("");
    this.#result.replaceChildren(h("h3", {}, "Estimate"), estimateBox(estimate));
  }

  async #make() {
    const body = this.body();
    const text = JSON.stringify(body);
    // The same request sent twice, by an impatient click or after a lost answer, makes one job.
    if (text !== this.#lastBody) {
      this.#lastBody = text;
      this.#key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    }
    const job = await this.#api.post("/v1/fine_tuning/jobs", body, { headers: { "idempotency-key": this.#key } });
    this.#lastBody = "";
    this.#say("");
    this.#onCreated(job);
  }

  // What is said back ----------------------------------------------------------------------------------------

  async #do(button, work) {
    // Not `disabled`, which would take the focus away from whoever pressed it with the keyboard.
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true");
    for (const name of Object.keys(this.#inputs)) this.#wrong(name, "");
    try {
      await work();
    } catch (error) {
      if (error instanceof FieldError) {
        this.#wrong(error.field, error.message);
        this.#inputs[error.field].focus();
      } else if (error instanceof ApiError) this.#fail(error);
      else throw error;
    } finally {
      button.removeAttribute("aria-disabled");
    }
  }

  /** Every broken rule stands beside its field, those of the JSON box beside that. */
  #fail(error) {
    const unplaced = [];
    for (const violation of error.details) {
      const name = violation.field in this.#inputs ? violation.field : /^(trilithon|seed|metadata|method|hyperparameters)\b/.test(violation.field) ? "more" : "";
      if (name) this.#wrong(name, violation.message, { add: true });
      else unplaced.push(violation);
    }
    this.#said.replaceChildren(failureCard(error, { unplaced }));
    Object.values(this.#inputs).find((input) => input.getAttribute("aria-invalid") === "true")?.focus();
  }

  #wrong(name, message, { add = false } = {}) {
    const place = this.#wrongs[name];
    place.textContent = add && place.textContent ? `${place.textContent} ${message}` : message;
    this.#inputs[name].setAttribute("aria-invalid", String(Boolean(message)));
  }

  #clear(input) {
    if (input.dataset.field) this.#wrong(input.dataset.field, "");
  }

  /** The JSON box is read as it is typed: its syntax need not wait for the server. */
  #checkMore() {
    try {
      parseMore(this.#inputs.more.value);
    } catch (error) {
      if (!(error instanceof FieldError)) throw error;
      this.#wrong("more", error.message);
    }
  }

  #say(words) {
    this.#said.replaceChildren(words);
  }
}
