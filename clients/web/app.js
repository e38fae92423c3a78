/** The playground: wires the form, the conversation, the header and the server together. */

import { Api, ApiError } from "./api.js";
import { byId, copyText, fit, h } from "./dom.js";
import { FieldError, ParameterForm } from "./params.js";
import { snippet } from "./snippets.js";
import { closePopover } from "./tokens.js";
import { Announcer, AnswerTurn, factsOf, userTurn } from "./turns.js";
import { Vitals } from "./vitals.js";

const EXAMPLES = {
  chat: ["Why is the sky blue? Answer in two sentences.", "Write a haiku about standing stones.", "List three uses of a lever."],
  completion: ["The three stones stood", "def fibonacci(n):", "Once upon a time,"],
};

const api = new Api();
const vitals = new Vitals(api);
const announcer = new Announcer(byId("announce"));
const params = new ParameterForm(byId("params"), { onchange: refresh });

const state = {
  mode: "chat",
  models: [],
  system: "",
  messages: [],
  running: null, // AbortController of the answer in progress
};

// The request ------------------------------------------------------------------------------------------------

const prompt = byId("prompt");
const system = h("textarea", { id: "system", rows: 1, placeholder: "none", spellcheck: "false" });
byId("params").prepend(
  h("div", { class: "row lines system", "data-field": "system" }, h("label", { for: "system" }, "System prompt"), system),
);

const pathOf = (mode) => (mode === "chat" ? "/v1/chat/completions" : "/v1/completions");

/** The body that Send would post now. Throws FieldError where a field cannot be put into JSON. */
function buildBody({ messages, text }) {
  const content = state.mode === "chat" ? { messages } : { prompt: text };
  const values = params.collect(state.mode);
  // The server streams no prompt probabilities on this route: an echo with colours comes in one piece.
  const whole = values.echo && values.logprobs !== undefined;
  const streaming = whole ? {} : { stream: true, stream_options: { include_usage: true } };
  return { model: byId("model").value, ...content, ...values, ...streaming };
}

const withSystem = (messages) => (system.value.trim() ? [{ role: "system", content: system.value }, ...messages] : messages);

function refresh() {
  const language = document.querySelector("input[name=snippet]:checked").value;
  const draft = prompt.value || EXAMPLES[state.mode][0];
  let code;
  try {
    const body = buildBody({ messages: withSystem([...state.messages, { role: "user", content: draft }]), text: draft });
    code = snippet(language, { origin: location.origin, path: pathOf(state.mode), body, hasKey: api.hasKey });
  } catch (error) {
    if (!(error instanceof FieldError)) throw error;
    code = error.message;
  }
  byId("snippet").textContent = code;
}

// The answer -------------------------------------------------------------------------------------------------

/** OpenAI's two shapes of log-probabilities -> [{token, logprob, top}], or null when there are none. */
function tokensOf(choice) {
  const logprobs = choice.logprobs;
  if (!logprobs) return null;
  if (logprobs.content) {
    return logprobs.content.map((item) => ({
      token: item.token,
      logprob: item.logprob,
      top: item.top_logprobs ?? [],
    }));
  }
  return (logprobs.tokens ?? []).map((token, index) => ({
    token,
    logprob: logprobs.token_logprobs[index] ?? null,
    top: Object.entries(logprobs.top_logprobs?.[index] ?? {})
      .map(([other, logprob]) => ({ token: other, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

async function answer({ body, turn, actions, onText }) {
  const controller = new AbortController();
  const started = performance.now();
  const seen = { first: null, last: null, chunks: 0, finish: "", detail: null, usage: null, fingerprint: "", requestId: "" };
  const elapsed = () => (performance.now() - started) / 1000;
  const numTokens = () => turn.numTokens || seen.chunks;
  setRunning(controller);
  try {
    for await (const chunk of api.stream(pathOf(state.mode), body, {
      signal: controller.signal,
      onRequestId: (id) => (seen.requestId = id),
    })) {
      seen.fingerprint ||= chunk.system_fingerprint ?? "";
      if (chunk.usage) seen.usage = chunk.usage;
      for (const choice of chunk.choices ?? []) {
        const text = choice.delta?.content ?? choice.text ?? "";
        const tokens = tokensOf(choice);
        if (text || tokens?.length) {
          seen.last = elapsed();
          seen.first ??= seen.last;
          seen.chunks += 1;
          turn.add(text, tokens);
          announcer.add(text);
          const rate = seen.chunks > 1 ? (numTokens() - 1) / Math.max(1e-3, seen.last - seen.first) : null;
          vitals.answer({ ttft: seen.first, rate: Number.isFinite(rate) && rate > 0 ? rate : null });
        }
        if (choice.finish_reason) seen.finish = choice.finish_reason;
        if (choice.stop_detail) seen.detail = choice.stop_detail;
      }
    }
    finished(seen.detail?.reason?.toLowerCase().replaceAll("_", " ") || seen.finish);
  } catch (error) {
    if (error.name === "AbortError") finished("stopped");
    else if (error instanceof ApiError) failed(error);
    else throw error;
  } finally {
    setRunning(null);
  }

  function finished(finish) {
    onText(turn.text);
    turn.settle();
    const facts = factsOf({
      ...seen, finish, constrained: Boolean(body.constraint ?? body.response_format), numTokens: numTokens(), ttft: seen.first, duration: seen.last ?? elapsed(), perplexity: turn.perplexity,
    });
    turn.finish({ facts, actions });
    announcer.finish(finish === "stopped" ? "Stopped." : `Answer complete: ${facts.slice(0, 2).join(", ")}.`);
  }

  function failed(error) {
    onText(turn.text);
    error.requestId ||= seen.requestId;
    const { rest, first } = params.showViolations(error.details);
    if (error.code === "invalid_api_key") params.showViolations([{ field: "api_key", message: error.message }]);
    turn.fail(error, { actions, unplaced: rest });
    announcer.finish(`Error ${error.code}.`);
    if (first && !isNarrow()) first.focus({ preventScroll: false });
  }
}

function setRunning(controller) {
  const hadFocus = document.activeElement;
  state.running = controller;
  vitals.busy = controller !== null;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  // The button that had the focus is gone: keep the keyboard where it was.
  if (controller && hadFocus === byId("send")) byId("stop").focus();
  if (!controller && hadFocus === byId("stop")) prompt.focus();
}

const stop = () => state.running?.abort();

// The conversation -------------------------------------------------------------------------------------------

function newTurn(options) {
  const log = byId("log");
  const turn = new AnswerTurn(byId("model").value || "model", {
    ...options,
    grew: () => {
      // Follow the answer only if the reader was at the end already.
      if (turn.follow) log.scrollTop = log.scrollHeight;
    },
  });
  turn.follow = true;
  log.addEventListener("scroll", () => (turn.follow = log.scrollHeight - log.scrollTop - log.clientHeight < 48));
  byId("turns").append(turn.element);
  byId("empty").hidden = true;
  log.scrollTop = log.scrollHeight;
  return turn;
}

function send(text) {
  params.clearViolations();
  let body;
  try {
    body = buildBody({ messages: withSystem([...state.messages, { role: "user", content: text }]), text });
  } catch (error) {
    if (!(error instanceof FieldError)) throw error;
    params.showViolations([{ field: error.field, message: error.message }]).first?.focus();
    return;
  }
  prompt.value = "";
  fit(prompt);
  if (state.mode === "chat") chat(text, body);
  else complete(text, body);
  refresh();
}

function chat(text, body) {
  const before = state.messages.length;
  state.messages.push({ role: "user", content: text });
  const asked = userTurn(text);
  byId("turns").append(asked);
  const turn = newTurn({});
  const again = () => {
    if (state.running) return;
    // Everything from this question on is replaced by the new answer.
    while (asked.nextElementSibling) asked.nextElementSibling.remove();
    asked.remove();
    state.messages.length = before;
    send(text);
  };
  answer({
    body,
    turn,
    actions: [["Try again", again]],
    onText: (said) => {
      if (said) state.messages.push({ role: "assistant", content: said });
      else state.messages.length = before;
      refresh();
    },
  });
}

function complete(text, body) {
  const turn = newTurn({ prefix: body.echo ? "" : text });
  const again = () => {
    if (state.running) return;
    turn.element.remove();
    send(text);
  };
  const onwards = () => {
    prompt.value = body.echo ? turn.text : text + turn.text;
    fit(prompt);
    prompt.focus();
    refresh();
  };
  answer({ body, turn, actions: [["Try again", again], ["Continue from here", onwards]], onText: () => {} });
}

function clear() {
  stop();
  closePopover();
  state.messages = [];
  byId("turns").replaceChildren();
  showEmpty();
  refresh();
  prompt.focus();
}

function showEmpty() {
  const model = state.models.find(({ id }) => id === byId("model").value);
  const facts = [];
  if (model?.max_context_tokens) facts.push(`${model.max_context_tokens.toLocaleString("en")} tokens of context`);
  if (model?.dtype) facts.push(model.dtype);
  if (model?.tp && model?.pp) facts.push(`tensor ${model.tp} x pipeline ${model.pp}`);
  if (model?.digest) facts.push(model.digest.slice(0, 12));
  const starters = EXAMPLES[state.mode].map((text) =>
    h("li", {}, h("button", { type: "button", onclick: () => { prompt.value = text; fit(prompt); prompt.focus(); refresh(); } }, text)),
  );
  byId("empty").hidden = byId("turns").children.length > 0;
  byId("empty").replaceChildren(
    h("h1", {}, model?.id ?? "Trilithon"),
    facts.length ? h("p", { class: "facts" }, ...facts.map((fact) => h("span", {}, fact))) : "",
    h("ul", { class: "starters", "aria-label": "Examples" }, ...starters),
  );
}

async function loadModels() {
  const select = byId("model");
  try {
    const { data } = await api.json("/v1/models");
    const chosen = select.value;
    state.models = data.filter((model) => !(model.capabilities?.length && !model.capabilities.some((c) => /generate|chat|complet/.test(c))));
    select.replaceChildren(...state.models.map(({ id }) => h("option", { value: id }, id)));
    if (state.models.some(({ id }) => id === chosen)) select.value = chosen;
    params.setDefaults(state.models.find(({ id }) => id === select.value)?.defaults);
    params.clearViolations();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    state.models = [];
    select.replaceChildren(h("option", { value: "" }, error.status === 401 ? "needs a key" : "no model"));
    if (error.status === 401) params.showViolations([{ field: "api_key", message: error.message }]);
  }
  showEmpty();
  refresh();
}

// Controls ---------------------------------------------------------------------------------------------------

const isNarrow = () => matchMedia("(max-width: 860px)").matches;

function showSide(open) {
  byId("desk").classList.toggle("side-open", open);
  byId("show-side").setAttribute("aria-expanded", String(open));
  (open ? byId("hide-side") : byId("show-side")).focus();
}

function setMode(mode) {
  state.mode = mode;
  params.setMode(mode);
  const label = mode === "chat" ? "Message" : "Text to continue";
  byId("prompt-label").textContent = label;
  prompt.placeholder = label;
  system.closest(".row").hidden = mode !== "chat";
  clear();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!state.running && prompt.value.trim()) send(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
prompt.addEventListener("input", () => { fit(prompt); refresh(); });
system.addEventListener("input", () => { fit(system); refresh(); });
byId("params").addEventListener("input", ({ target }) => target.matches("textarea") && fit(target));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.running) stop();
  else if (byId("desk").classList.contains("side-open")) showSide(false);
});
byId("stop").addEventListener("click", stop);
byId("clear").addEventListener("click", clear);
byId("show-side").addEventListener("click", () => showSide(true));
byId("hide-side").addEventListener("click", () => showSide(false));
byId("copy-snippet").addEventListener("click", ({ currentTarget }) => copyText(byId("snippet").textContent, currentTarget));
byId("model").addEventListener("input", () => {
  params.setDefaults(state.models.find(({ id }) => id === byId("model").value)?.defaults);
  showEmpty();
  refresh();
});
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", () => setMode(radio.value));
for (const radio of document.querySelectorAll("input[name=snippet]")) radio.addEventListener("change", refresh);
params.apiKeyInput.addEventListener("input", () => (api.key = params.apiKeyInput.value));
params.apiKeyInput.addEventListener("change", loadModels);
byId("log").addEventListener("scroll", closePopover);

params.setMode("chat");
vitals.start();
await loadModels();
if (!isNarrow()) prompt.focus();
