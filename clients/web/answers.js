/** Answers: a question about an index or documents, the answer, and the passages that it comes from. */

import { Documents } from "./documents.js";
import { byId, h, percent } from "./dom.js";
import { TaskPage, usageFacts } from "./task_page.js";

const page = new TaskPage({ onModels: show });
const documents = new Documents();
const model = h("select", {});
const index = h("select", {});
const question = h("textarea", { rows: 2, placeholder: "Who built the old mill?" });
const reader = h("select", {}, ...[["", "what the model is"], ["span", "span: words of a passage"], ["joint", "joint: all passages together"], ["individual", "individual: each passage"], ["causal", "causal: own words"]].map(([value, label]) => h("option", { value }, label)));
const mode = h("select", {}, ...[["", "meaning"], ["bm25", "words (BM25)"], ["hybrid", "both"]].map(([value, label]) => h("option", { value }, label)));

byId("ask").append(
  page.field("question", "Question", question),
  h("fieldset", {}, h("legend", {}, "Where to look"),
    page.field("index", "Index", index),
    page.group("documents", "Documents", documents.element, { hint: "In place of an index." }),
    page.field("mode", "Passages by", mode),
    page.number("top_k", "Passages", "5")),
  h("fieldset", {}, h("legend", {}, "Who reads"), page.field("model", "Model", model), page.field("reader", "Reader", reader), page.number("sampling.max_tokens", "Tokens", "32")),
  h("div", { class: "actions" }, h("button", { type: "submit", class: "primary", id: "go" }, "Ask"), h("button", { type: "button", class: "primary stop", id: "stop", hidden: true }, "Stop")),
);

async function show(models) {
  const names = models.filter(({ capabilities }) => capabilities?.some((one) => one === "generate" || one === "answer")).map(({ id }) => id);
  const options = [["", "the first that can"], ...names.map((name) => [name, name])];
  fill(model, options);
  const { indexes } = await page.api.json("/v1/retrieval/indexes").catch((error) => {
    if (error.code === "store_missing") return { indexes: [] };
    throw error;
  });
  const states = indexes.map(({ name, passages, state }) => [name, state === "ready" ? `${name} (${passages} passages)` : `${name} (${state})`]);
  fill(index, [["", indexes.length ? "none" : "none stored"], ...states]);
}

function fill(select, options) {
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, label]) => h("option", { value }, label)));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

/** A passage with the part of it that answers. Offsets count code points. */
function passageText({ passage, start, end }) {
  const letters = [...passage.text];
  if (end <= start) return [passage.text];
  return [letters.slice(0, start).join(""), h("mark", {}, letters.slice(start, end).join("")), letters.slice(end).join("")];
}

function evidenceRow(evidence) {
  const { passage, retrieval_logprob: found, answer_logprob: read } = evidence;
  return h(
    "li",
    {},
    h("h3", {}, passage.title || passage.id),
    h("p", { class: "passage" }, ...passageText(evidence)),
    h("p", { class: "notes" }, h("span", { title: "Of all passages that were read" }, `passage ${percent(Math.exp(found))}`), Number.isFinite(read) ? h("span", {}, `answer in it ${percent(Math.exp(read))}`) : null),
  );
}

function draw(answer) {
  const facts = [`reader ${answer.reader}`, answer.model, `log-probability ${answer.logprob.toFixed(2)}`, ...usageFacts(answer.usage)];
  if (answer.index_version) facts.push(`index version ${answer.index_version}`);
  if (answer.finish_reason === "time_limit") facts.push("time limit: not all passages were read");
  byId("answered").replaceChildren(
    answer.no_answer ? h("p", { class: "answer none" }, "No answer was found.") : h("p", { class: "answer" }, answer.answer),
    h("p", { class: "notes" }, ...facts.map((fact) => h("span", {}, fact))),
    h("ol", { class: "evidence", "aria-label": "Evidence" }, ...answer.evidence.map(evidenceRow)),
  );
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = documents.values;
  const sampling = page.values("sampling.max_tokens");
  const body = {
    model: model.value,
    question: question.value,
    reader: reader.value,
    mode: mode.value,
    return_evidence: true,
    ...(index.value ? { index: index.value } : {}),
    ...(given.length ? { documents: given } : {}),
    ...(Object.keys(sampling).length ? { sampling } : {}),
    ...page.values("top_k"),
  };
  page.run(async (signal) => draw(await page.api.post("/v1/openqa", body, { signal })));
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});

if (await page.start()) question.focus();
