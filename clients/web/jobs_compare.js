/**
 * What the job changed: the same prompt sent to the base and to what the job made, side by side; for tasks that find
 * something in texts, what is found, marked in the text.
 */

import { ApiError } from "./api.js";
import { h, percent } from "./dom.js";
import { failureCard } from "./failure.js";
import { marked, placeOf, shares } from "./jobs_found.js";
import { AnswerTurn, factsOf } from "./turns.js";

const QUESTION = "Context: \nQuestion: \nAnswer";

/** By task: how its models are asked, and what a completion's prompt looks like. */
const WAYS = {
  sft: { way: "generate", chat: true },
  dpo: { way: "generate", chat: true },
  lm: { way: "generate" },
  answer_qa: { way: "generate", draft: `${QUESTION}:` },
  yes_no_maybe: { way: "generate", draft: `${QUESTION} (yes, no or maybe):` },
  ner: { way: "entities" },
  relation: { way: "relations" },
  span_qa: { way: "spans" },
  classify: { way: "classes" },
};

const FIELDS = {
  generate: [["prompt", "Prompt", "lines"]],
  entities: [["text", "Text", "lines"]],
  classes: [["text", "Text", "lines"], ["pair", "Second text", "line"]],
  spans: [["question", "Question", "line"], ["text", "Context", "lines"]],
  relations: [["text", "Text", "lines"], ["a", "First mention", "line"], ["a-type", "Its type", "line"], ["b", "Second mention", "line"], ["b-type", "Its type", "line"]],
};

export class Compare {
  #api;
  #job = null;
  #way = null;
  #fields = {};
  #models = h("select", { id: "after", "aria-label": "Model of the job" });
  #note = h("p", { class: "faint" });
  #form = h("form", { class: "compare-form", autocomplete: "off", hidden: true });
  #answers = h("div", { class: "pair answers", hidden: true });
  #ask = h("button", { type: "submit", class: "primary", id: "compare" }, "Ask");
  #abort = null;

  constructor(api) {
    this.#api = api;
    this.element = h("section", { class: "card compare" }, h("h3", {}, "Before and after"), this.#note, this.#form, this.#answers);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#abort) this.#abort.abort();
      else this.#run();
    });
  }

  close() {
    this.#abort?.abort();
  }

  show(job) {
    const first = this.#job === null;
    this.#job = job;
    if (!first) return;
    this.#way = WAYS[job.trilithon.task] ?? null;
    if (this.#way === null) this.#note.textContent = `A model of the task ${job.trilithon.task} says nothing by itself.`;
    else {
      this.#note.textContent = "Nothing of this job is served yet.";
      this.#build();
    }
  }

  /** The models that this job made and that are served. */
  async readModels(signal) {
    if (this.#way === null) return;
    const { data } = await this.#api.json("/v1/models", { signal });
    const made = data.filter(({ kind, job_id: job }) => kind !== "alias" && job === this.#job.id);
    const chosen = this.#models.value;
    this.#models.replaceChildren(...made.map(({ id }) => h("option", { value: id }, id)));
    if (made.some(({ id }) => id === chosen)) this.#models.value = chosen;
    else if (made.some(({ id }) => id === this.#job.fine_tuned_model)) this.#models.value = this.#job.fine_tuned_model;
    const chats = data.some(({ id, capabilities }) => id === this.#job.model && capabilities?.includes("chat"));
    if (this.#fields.chat && !this.#fields.chat.dataset.known) {
      this.#fields.chat.dataset.known = "true";
      this.#fields.chat.checked = chats && Boolean(this.#way.chat);
      this.#fields.chat.disabled = !chats;
    }
    this.#note.hidden = made.length > 0;
    this.#form.hidden = this.#answers.hidden = made.length === 0;
  }

  #build() {
    const labelled = (id, label, input, kind = "") => {
      this.#fields[id] = input;
      return h("div", { class: `field ${kind}` }, h("label", { for: `try-${id}` }, label), input);
    };
    const parts = FIELDS[this.#way.way].map(([id, label, kind]) => {
      const input = kind === "lines" ? h("textarea", { id: `try-${id}`, rows: 3 }) : h("input", { type: "text", id: `try-${id}` });
      return labelled(id, label, input, kind === "lines" ? "wide" : "");
    });
    if (this.#way.way === "generate") {
      this.#fields.prompt.value = this.#way.draft ?? "";
      parts.push(
        labelled("max_tokens", "max_tokens", h("input", { type: "text", id: "try-max_tokens", value: "64", inputmode: "numeric", size: 6 })),
        labelled("temperature", "temperature", h("input", { type: "text", id: "try-temperature", value: "0", inputmode: "decimal", size: 6 })),
        labelled("chat", "as a chat", h("input", { type: "checkbox", class: "switch", id: "try-chat" })),
      );
    }
    if (this.#way.way === "relations") {
      const options = (this.#job.trilithon.resolved ?? this.#job.trilithon.config).options ?? {};
      const [a, b] = options.pairs?.[0] ?? ["CHEMICAL", "GENE"];
      this.#fields["a-type"].value = a;
      this.#fields["b-type"].value = b;
    }
    this.#form.append(...parts, h("div", { class: "field last" }, this.#models, this.#ask));
  }

  async #run() {
    this.#abort = new AbortController();
    this.#ask.textContent = "Stop";
    this.#ask.classList.add("stop");
    try {
      await (this.#way.way === "generate" ? this.#generate() : this.#extract());
    } finally {
      this.#abort = null;
      this.#ask.textContent = "Ask";
      this.#ask.classList.remove("stop");
    }
  }

  // Answers --------------------------------------------------------------------------------------------------

  async #generate() {
    const number = (id) => (this.#fields[id].value.trim() === "" || Number.isNaN(Number(this.#fields[id].value)) ? this.#fields[id].value : Number(this.#fields[id].value));
    const chat = this.#fields.chat.checked;
    const text = this.#fields.prompt.value;
    const content = chat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
    const body = { ...content, max_tokens: number("max_tokens"), temperature: number("temperature"), stream: true, stream_options: { include_usage: true } };
    const path = chat ? "/v1/chat/completions" : "/v1/completions";
    const models = [this.#job.model, this.#models.value];
    const turns = models.map((model, index) => new AnswerTurn(`${index ? "after" : "before"}: ${model}`, { grew: () => {} }));
    this.#answers.replaceChildren(...turns.map((turn) => h("ol", { class: "answer" }, turn.element)));
    const { signal } = this.#abort;
    await Promise.all(models.map((model, index) => this.#stream(path, { model, ...body }, turns[index], signal)));
  }

  async #stream(path, body, turn, signal) {
    const started = performance.now();
    const seen = { finish: "", usage: null, first: null, last: 0, chunks: 0, requestId: "" };
    try {
      for await (const chunk of this.#api.stream(path, body, { signal, onRequestId: (id) => (seen.requestId = id) })) {
        if (chunk.usage) seen.usage = chunk.usage;
        for (const choice of chunk.choices ?? []) {
          const text = choice.delta?.content ?? choice.text ?? "";
          if (text) {
            seen.last = (performance.now() - started) / 1000;
            seen.first ??= seen.last;
            seen.chunks += 1;
            turn.add(text, null);
          }
          if (choice.finish_reason) seen.finish = choice.finish_reason;
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        if (!(error instanceof ApiError)) throw error;
        error.requestId ||= seen.requestId;
        turn.fail(error, { actions: [], unplaced: error.details });
        return;
      }
      seen.finish = "stopped";
    }
    turn.finish({ facts: factsOf({ ...seen, numTokens: seen.chunks, ttft: seen.first, duration: seen.last, perplexity: null }), actions: [] });
  }

  async #extract() {
    const text = this.#fields.text.value;
    const box = h("div", { class: "answer whole", "aria-live": "polite" }, h("p", { class: "faint" }, "asking"));
    this.#answers.replaceChildren(box);
    try {
      const options = { signal: this.#abort.signal };
      box.replaceChildren(...(await this.#found(text, (way, body) => this.#api.post(`/v1/extract/${way}`, { model: this.#models.value, ...body }, options))));
    } catch (error) {
      if (error.name === "AbortError") box.replaceChildren(h("p", { class: "faint" }, "stopped"));
      else if (error instanceof ApiError) box.replaceChildren(failureCard(error, { unplaced: error.details }));
      else throw error;
    }
  }

  async #found(text, post) {
    const field = (id) => this.#fields[id].value;
    if (this.#way.way === "entities") {
      const [{ entities }] = (await post("entities", { texts: [text] })).documents;
      const spans = entities.map(({ start, end, type }) => ({ start, end, label: type }));
      return [marked(text, spans), h("p", { class: "notes" }, entities.length ? `${entities.length} found` : "Nothing found.")];
    }
    if (this.#way.way === "classes") {
      const pairs = field("pair") ? { text_pairs: [field("pair")] } : {};
      const [{ label, probs }] = (await post("classes", { texts: [text], ...pairs })).results;
      return [shares(probs, label)];
    }
    if (this.#way.way === "spans") {
      const answer = await post("spans", { question: field("question"), contexts: [text] });
      const [best] = answer.answers;
      const spans = best && !answer.no_answer ? [{ start: best.start, end: best.end, label: percent(best.probability) }] : [];
      const others = answer.answers.map((item) => h("li", {}, `${item.text} (${percent(item.probability)})`));
      return [marked(text, spans), h("p", { class: "notes" }, `no answer: ${percent(answer.no_answer_probability)}`), h("ol", { class: "others" }, ...others)];
    }
    const mentions = ["a", "b"].map((id) => ({ ...placeOf(text, field(id)), type: field(`${id}-type`) }));
    const missing = ["a", "b"].find((id, index) => mentions[index].start === undefined);
    if (missing) return [h("p", { class: "wrong" }, `The ${missing === "a" ? "first" : "second"} mention must stand in the text. Given: ${field(missing) || "nothing"}.`)];
    const [{ label, probs }] = (await post("relations", { text, pairs: [{ a: mentions[0], b: mentions[1] }] })).relations;
    return [marked(text, mentions.map(({ start, end, type }) => ({ start, end, label: type }))), shares(probs, label)];
  }
}
