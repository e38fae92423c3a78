/** Stories: a sentence at a time, with the keywords and the facts that it was written from, which can be changed. */

import { ApiError } from "./api.js";
import { byId, h, seconds } from "./dom.js";
import { chooseModel, TaskPage, usageFacts } from "./task_page.js";
import { Announcer } from "./turns.js";

const page = new TaskPage({ onModels: (models) => chooseModel(model, models, "generate") });
const announcer = new Announcer(byId("announce"));
const model = h("select", {});
const first = h("textarea", { rows: 3, placeholder: "Mia found an old key under the stairs." });
const plan = h("textarea", { rows: 4, spellcheck: "false", placeholder: "3: rain, umbrella\n4: home" });
const state = { id: "", sentences: [] };

byId("ask").append(
  page.field("model", "Model", model),
  h("fieldset", {}, h("legend", {}, "The story"),
    page.field("first_sentence", "First sentence", first),
    page.number("sentences", "Sentences to write", "4"),
    page.field("controls", "Keywords", plan, { hint: "A line for each sentence that is to be about something: its number, a colon, words with commas." })),
  h("fieldset", {}, h("legend", {}, "How it is written"),
    page.number("knowledge_k", "Facts a sentence", "3 where there are any"),
    h("div", { class: "small" }, page.number("temperature", "Temperature", "0.7"), page.number("max_tokens", "Tokens", "64"), page.number("seed", "Seed", "drawn"))),
  h("div", { class: "actions" }, h("button", { type: "submit", class: "primary", id: "go" }, "Write"), h("button", { type: "button", class: "primary stop", id: "stop", hidden: true }, "Stop")),
);

/** "key, old door" -> ["key", "old door"]. */
const words = (text) => text.split(",").map((word) => word.trim()).filter(Boolean);

/** "3: rain, umbrella" lines -> controls. A line without a number keeps none, and the server says what is wrong. */
export function parseControls(text) {
  return text.split("\n").filter((line) => line.trim()).map((line) => {
    const [, index, rest] = /^\s*(\d*)\s*:?(.*)$/.exec(line);
    return { index: Number(index), keywords: words(rest) };
  });
}

// One sentence -----------------------------------------------------------------------------------------------

function factRow({ text, score }) {
  return h("li", {}, h("span", {}, text), h("small", { title: "How well it goes with the story" }, score.toFixed(2)));
}

/** A sentence with what it was written from; the first one was given. */
function sentenceRow({ index, text, keywords, facts, logprob, reused, unknown_keywords: unknown, unopposed_keywords: unopposed }) {
  const given = index === 1;
  const notes = [];
  if (!given) notes.push(`log-probability ${logprob.toFixed(1)}`);
  if (reused && !given) notes.push("as it was");
  if (unknown?.length) notes.push(`nothing known of ${unknown.join(", ")}`);
  if (unopposed?.length) notes.push(`no opposite of ${unopposed.join(", ")}`);
  return h(
    "li",
    { class: "sentence", "data-index": index, "data-reused": reused === true },
    h("p", { class: "said" }, text),
    given ? null : editor(index, keywords),
    facts.length ? h("details", { class: "grounds", open: true }, h("summary", {}, `Knowledge: ${facts.length}`), h("ol", {}, ...facts.map(factRow))) : null,
    h("p", { class: "notes" }, ...notes.map((note) => h("span", {}, note))),
  );
}

/** Keywords of a sentence, to be changed: the story is written again from there. */
function editor(index, keywords) {
  const id = `keywords-${index}`;
  const input = h("input", { type: "text", id, value: keywords.join(", "), spellcheck: "false", autocomplete: "off" });
  const form = h(
    "form",
    { class: "keywords" },
    h("label", { for: id }, "about"),
    input,
    h("button", { type: "submit", class: "quiet rewrite" }, "Rewrite from here"),
    h("button", { type: "button", class: "quiet opposite", title: "Write it again about the opposites of its keywords", onclick: () => rewrite({ index, keywords: words(input.value), mode: "antonym" }) }, "Opposite"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    rewrite({ index, keywords: words(input.value), mode: "replace" });
  });
  return form;
}

// The story --------------------------------------------------------------------------------------------------

async function tell(path, body, from) {
  if (page.busy) return;
  const started = performance.now();
  let finished = null;
  byId("notes").textContent = "";
  const ended = await page.run(async (signal) => {
    for await (const { event, document } of page.api.task(path, body, { signal })) {
      if (event === "started") begin(document, from);
      else if (event === "sentence") put(document);
      else finished = document;
    }
  });
  if (ended !== "done" && from > 1) await showKept();
  byId("notes").replaceChildren(...factsOf(finished, ended, (performance.now() - started) / 1000).map((fact) => h("span", {}, fact)));
  announcer.finish(ended === "done" ? "Story complete." : ended === "stopped" ? "Stopped." : "");
}

/** What the server has of the story, where it can be asked: a rewrite takes its place with its first new sentence. */
async function showKept() {
  try {
    const { sentences } = await page.api.json(`/v1/stories/${encodeURIComponent(state.id)}`);
    if (!page.busy) show(sentences);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
  }
}

/** What comes before `from` stands; the rest is to be written. */
function begin({ story_id: id }, from) {
  state.id = id;
  show(state.sentences.filter(({ index }) => index < from));
  byId("story").setAttribute("aria-busy", "true");
}

function show(sentences) {
  state.sentences = sentences;
  byId("story").replaceChildren(...sentences.map(sentenceRow));
  byId("story").removeAttribute("aria-busy");
}

/** A sentence in its place; one that was there before keeps its row where nothing of it changed. */
function put(sentence) {
  const row = sentenceRow(sentence);
  const old = byId("story").querySelector(`[data-index="${sentence.index}"]`);
  state.sentences = [...state.sentences.filter(({ index }) => index !== sentence.index), sentence].sort((a, b) => a.index - b.index);
  if (old) old.replaceWith(row);
  else byId("story").append(row);
  if (!sentence.reused) announcer.add(`${sentence.text} `);
}

function factsOf(finished, ended, duration) {
  byId("story").removeAttribute("aria-busy");
  if (!finished) return ended === "stopped" ? ["stopped"] : [];
  const facts = [...usageFacts(finished.usage), seconds(duration), `seed ${finished.seed}`, finished.model];
  return finished.finish_reason === "time_limit" ? ["time limit", ...facts] : facts;
}

function rewrite(control) {
  tell(`/v1/stories/${encodeURIComponent(state.id)}/rewrite`, { control }, control.index);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const controls = parseControls(plan.value);
  const body = { model: model.value, first_sentence: first.value, ...(controls.length ? { controls } : {}) };
  tell("/v1/stories", { ...body, ...page.values("sentences", "knowledge_k", "temperature", "max_tokens", "seed") }, 1);
});

if (await page.start()) first.focus();
