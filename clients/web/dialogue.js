/** Dialogue: the next turn of a conversation, in somebody's voice, grounded in documents. */

import { Documents } from "./documents.js";
import { byId, fit, h } from "./dom.js";
import { chooseModel, TaskPage, usageFacts } from "./task_page.js";
import { Announcer, AnswerTurn, userTurn } from "./turns.js";

const SPEAKERS = { me: "target", them: "other" };

const page = new TaskPage({ onModels: (models) => chooseModel(model, models, "generate") });
const documents = new Documents();
const announcer = new Announcer(byId("announce"));
const model = h("select", {});
const state = { turns: [] };

/** "Me: ..." and "Them: ..." lines -> turns; an empty line begins another conversation. Other lines go on with a turn. */
export function parseReferences(text) {
  const conversations = text.split(/\n\s*\n/).map((block) => {
    const turns = [];
    for (const line of block.split("\n").filter((one) => one.trim())) {
      const match = /^\s*(me|them)\s*:\s*(.*)$/i.exec(line);
      if (match) turns.push({ speaker: SPEAKERS[match[1].toLowerCase()], text: match[2] });
      else if (turns.length) turns.at(-1).text += ` ${line.trim()}`;
      else turns.push({ speaker: "target", text: line.trim() });
    }
    return turns;
  });
  return conversations.filter((turns) => turns.length);
}

const scorer = h("select", {}, ...[["", "words (TF-IDF)"], ["bm25", "words (BM25)"], ["dense", "meaning"], ["hybrid", "both"]].map(([value, label]) => h("option", { value }, label)));

byId("ask").append(
  page.field("model", "Model", model),
  h("fieldset", {}, h("legend", {}, "What it knows"),
    page.group("knowledge.documents", "Documents", documents.element, { hint: "Sentences that go with the last turns are chosen from them." }),
    page.field("knowledge.scorer", "Sentences by", scorer, { hint: "Meaning needs a served encoder." }),
    page.number("knowledge.top_k", "Sentences", "5")),
  h("fieldset", {}, h("legend", {}, "Who it is"),
    page.field("references", "Earlier conversations", h("textarea", { rows: 5, placeholder: "Me: I never leave the mill.\nThem: Why not?\n\nMe: Good morning." }), { hint: "Me is who answers. An empty line begins another conversation." }),
    page.field("topic", "Topic", h("input", { type: "text" }), { hint: "For a model that is prompted by examples." })),
  h("fieldset", {}, h("legend", {}, "How it writes"),
    h("div", { class: "small" }, page.number("temperature", "Temperature", "1"), page.number("max_tokens", "Tokens", "128"), page.number("seed", "Seed", "drawn"))),
);

function body() {
  const given = documents.values;
  const references = parseReferences(page.text("references"));
  const topic = page.text("topic");
  const knowledge = { documents: given, scorer: scorer.value, ...page.values("knowledge.top_k") };
  return {
    model: model.value,
    conversation: state.turns,
    ...(references.length ? { references } : {}),
    ...(topic.trim() ? { topic } : {}),
    ...(given.length ? { knowledge } : {}),
    ...page.values("temperature", "max_tokens", "seed"),
  };
}

/** The sentences that an answer stands on, and what was left out. */
function grounds(knowledge) {
  return h(
    "details",
    { class: "grounds" },
    h("summary", {}, `Knowledge: ${knowledge.length} sentence${knowledge.length === 1 ? "" : "s"}`),
    h("ol", {}, ...knowledge.map(({ text, document_id, score, generated }) => h("li", {}, h("span", {}, text), h("small", {}, generated ? "made up by the model" : `${document_id} ${score.toFixed(2)}`)))),
  );
}

function factsOf(answer) {
  const [candidate] = answer.candidates;
  const facts = [candidate.finish_reason, ...usageFacts(answer.usage), `log-probability ${candidate.mean_logprob.toFixed(2)} a token`];
  if (answer.reference_tokens) facts.push(`${answer.reference_tokens} tokens of earlier conversations`);
  for (const [name, what] of [["turns_dropped", "turns"], ["reference_turns_dropped", "earlier turns"], ["knowledge_dropped", "sentences"]]) {
    if (answer[name]) facts.push(`no room for ${answer[name]} ${what}`);
  }
  return facts;
}

async function say(text) {
  if (page.busy) return;
  const { turns } = state; // Clear begins others while this waits
  const before = turns.length;
  turns.push({ speaker: "other", text });
  const asked = userTurn(text, { role: "them" });
  const turn = new AnswerTurn("me", { grew: () => (byId("log").scrollTop = byId("log").scrollHeight) });
  byId("turns").append(asked, turn.element);
  byId("say").value = "";
  fit(byId("say"));
  const again = () => {
    if (page.busy) return;
    while (asked.nextElementSibling) asked.nextElementSibling.remove();
    asked.remove();
    turns.length = before;
    say(text);
  };
  const known = [];
  let answer = null;
  const ended = await page.run(async (signal) => {
    for await (const { event, document } of page.api.task("/v1/dialogue", body(), { signal })) {
      if (event === "knowledge") known.push(document);
      else if (event === "delta") {
        turn.add(document.delta, null);
        announcer.add(document.delta);
      } else answer = document;
    }
  });
  if (state.turns !== turns) {
    announcer.finish("Stopped.");
    return;
  }
  if (ended === "failed") {
    asked.remove();
    turn.element.remove();
    turns.length = before;
    byId("say").value = text;
    byId("say").focus();
    return;
  }
  const said = (answer?.candidates[0].text ?? turn.text).trim();
  if (said) turns.push({ speaker: "target", text: said });
  else turns.length = before;
  turn.finish({ facts: answer ? factsOf(answer) : ["stopped"], actions: [["Try again", again]] });
  if (known.length) turn.element.append(grounds(known));
  announcer.finish(ended === "stopped" ? "Stopped." : "Answer complete.");
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("say").value.trim()) say(byId("say").value);
});
byId("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
byId("say").addEventListener("input", () => fit(byId("say")));
byId("clear").addEventListener("click", () => {
  page.stop();
  state.turns = [];
  byId("turns").replaceChildren();
  byId("failure").replaceChildren();
  byId("say").focus();
});

if (await page.start()) byId("say").focus();
