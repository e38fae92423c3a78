/** What the server refused or failed at, as a card: the code, the sentence, the request that its log knows. */

import { h } from "./dom.js";

/**
 * `actions` are [label, what to do] pairs; `unplaced` are the broken rules that stand beside no field. Not `live` where
 * the card is redrawn while nothing new has happened: an alert is read out each time that it appears.
 */
export function failureCard(error, { actions = [], unplaced = [], live = true } = {}) {
  const id = h("code", { class: "request-id" }, error.requestId || "none");
  const buttons = actions.map(([label, act]) => h("button", { type: "button", class: "quiet", onclick: act }, label));
  const list = unplaced.length > 1 ? h("ul", {}, ...unplaced.map((violation) => h("li", {}, violation.message))) : null;
  return h(
    "div",
    { class: "failure", role: live ? "alert" : null },
    h("p", { class: "failure-head" }, h("code", { class: "error-code" }, error.code), error.status ? h("span", {}, `HTTP ${error.status}`) : null),
    h("p", { class: "failure-text" }, error.message),
    list,
    h(
      "p",
      { class: "notes" },
      error.retryAfter ? h("span", {}, `retry after ${error.retryAfter} s`) : null,
      h("span", {}, "request ", id),
      ...buttons,
    ),
  );
}
