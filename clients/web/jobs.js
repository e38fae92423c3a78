/** The page of finetuning jobs: the list at the side, and beside it the chosen job or the form for a new one. */

import { Api, ApiError } from "./api.js";
import { byId, h } from "./dom.js";
import { failureCard } from "./failure.js";
import { JobList } from "./jobs_list.js";
import { NewJob } from "./jobs_new.js";
import { JobView } from "./jobs_view.js";

const LIVE_MS = 3000;
const CALM_MS = 10000;

const api = new Api();
const list = new JobList(byId("list"));
const detail = byId("detail");

const state = {
  view: null, // the JobView on the page, or null
  timer: 0,
  reading: false,
  served: true, // whether this server has jobs at all
};

// The list -----------------------------------------------------------------------------------------------------

function note(words) {
  if (byId("list-note").textContent !== words) byId("list-note").textContent = words;
}

function ready(kind, words) {
  byId("ready").dataset.state = kind;
  if (byId("ready-text").textContent !== words) byId("ready-text").textContent = words;
}

/** Look at the list now, and again later; not while nobody sees the page. */
async function look() {
  clearTimeout(state.timer);
  if (state.reading || document.hidden || !state.served) return;
  state.reading = true;
  let wait = LIVE_MS;
  try {
    const page = await api.json("/v1/fine_tuning/jobs?limit=20");
    if (list.isEmpty) byId("older").hidden = !page.has_more;
    list.showNewest(page.data);
    list.choose(location.hash.slice(1));
    for (const job of page.data) state.view?.take(job);
    wait = list.live ? LIVE_MS : CALM_MS;
    ready("up", "up to date");
    note(list.isEmpty ? "No jobs yet." : "");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    wait = refused(error);
  } finally {
    state.reading = false;
  }
  if (wait) state.timer = setTimeout(look, wait);
}

/** What the page says to a refusal of its list; when to look again, 0 for not by itself. */
function refused(error) {
  if (error.code === "route_not_found") {
    state.served = false;
    noJobs();
    return 0;
  }
  if (error.status === 401 || error.status === 403) {
    askForKey(error);
    return 0;
  }
  ready(error.status === 429 || error.status === 503 ? "wait" : "down", error.code === "connection_failed" ? "unreachable" : error.code);
  note(`${error.message} Trying again.`);
  return Math.max(LIVE_MS, 1000 * Number(error.retryAfter));
}

function askForKey(error) {
  ready("wait", "needs a key");
  note(error.message);
  if (byId("key-form").hidden) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
}

/** The server runs without jobs: how to turn them on. */
function noJobs() {
  ready("wait", "no jobs here");
  byId("new").hidden = true;
  close();
  detail.replaceChildren(
    h(
      "article",
      { class: "job" },
      h("h1", {}, "This server has no finetuning jobs"),
      h("p", {}, "Start it with ", h("code", {}, "--jobs"), ", and it keeps a store of jobs and files and a worker beside it:"),
      h("pre", { class: "command" }, "trilithon serve MODEL --jobs"),
      h("p", {}, "Or name the store's directory in its configuration, as ", h("code", {}, "jobs.store"), "."),
    ),
  );
}

async function older() {
  try {
    const page = await api.json(`/v1/fine_tuning/jobs?limit=20&after=${encodeURIComponent(list.lastId)}`);
    list.showOlder(page.data);
    list.choose(location.hash.slice(1));
    byId("older").hidden = !page.has_more;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    note(error.message);
  }
}

// What is beside it ----------------------------------------------------------------------------------------------

function close() {
  state.view?.close();
  state.view = null;
}

async function open() {
  if (!state.served) return;
  const name = location.hash.slice(1);
  if (name === "detail") return; // the skip link
  close();
  list.choose(name);
  if (name === "new") await openForm();
  else if (name) openJob(name);
  else detail.replaceChildren(h("p", { class: "faint hollow" }, "Choose a job, or make a new one."));
}

async function openForm() {
  const form = new NewJob(api, {
    onCreated: (job) => {
      list.showNewest([job]);
      location.hash = job.id;
    },
  });
  detail.replaceChildren(form.element);
  try {
    await form.load();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (form.element.isConnected) detail.replaceChildren(failureCard(error, { actions: [["Try again", open]] }));
  }
}

function openJob(id) {
  const view = new JobView(api, id, { onJob: (job) => list.update(job) });
  state.view = view;
  detail.replaceChildren(view.element);
  let shown = "";
  view.start({
    onFailure: (error) => {
      if (state.view !== view) return;
      const lasting = error && [401, 403, 404].includes(error.status);
      if (lasting) {
        close();
        detail.replaceChildren(failureCard(error, { actions: [["Try again", open]] }));
      }
      const words = error && !lasting ? `${error.message} Trying again.` : "";
      if (words !== shown) note((shown = words));
    },
  });
}

// Controls -------------------------------------------------------------------------------------------------------

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key = byId("key").value;
  list.clear();
  look();
  open();
});
byId("older").addEventListener("click", older);
window.addEventListener("hashchange", open);
document.addEventListener("visibilitychange", look);

await look();
await open();
