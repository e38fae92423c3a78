/** What encoders find in texts, as pieces of page. The server counts characters as Unicode does, not as JavaScript. */

import { h, percent } from "./dom.js";

/**
 * A text with marks: `spans` are {start, end, label} in code points, `end` exclusive. One that begins within an earlier
 * one is left out, and its label is told behind the text.
 */
export function marked(text, spans) {
  const letters = Array.from(text);
  const parts = [];
  const left = [];
  let at = 0;
  for (const { start, end, label } of spans.toSorted((a, b) => a.start - b.start || b.end - a.end)) {
    if (start < at) {
      left.push(`${label}: ${letters.slice(start, end).join("")}`);
      continue;
    }
    parts.push(letters.slice(at, start).join(""), h("mark", { class: "entity" }, letters.slice(start, end).join(""), h("small", {}, label)));
    at = end;
  }
  parts.push(letters.slice(at).join(""));
  return h("div", {}, h("p", { class: "found" }, ...parts), left.length ? h("p", { class: "faint" }, `Also ${left.join(", ")}`) : null);
}

/** Labels with their probabilities, the likeliest first. */
export function shares(probabilities, chosen) {
  const rows = Object.entries(probabilities).toSorted(([, a], [, b]) => b - a).map(([label, share]) =>
    h(
      "tr",
      { class: label === chosen ? "chosen" : null },
      h("th", { scope: "row" }, label),
      h("td", { class: "bar-cell" }, h("progress", { max: 1, value: share, "aria-label": label })),
      h("td", { class: "end" }, percent(share)),
    ),
  );
  return h("table", { class: "histogram" }, h("tbody", {}, ...rows));
}

/** Where `words` stand in a text, in code points, or null. */
export function placeOf(text, words) {
  const at = words ? text.indexOf(words) : -1;
  if (at < 0) return null;
  const start = Array.from(text.slice(0, at)).length;
  return { start, end: start + Array.from(words).length };
}
