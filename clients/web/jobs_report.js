/** The report of a data file, and the estimate of a job, as pieces of page. */

import { h } from "./dom.js";
import { bytes, count, duration } from "./jobs_words.js";

/** A table of names and values. */
export function facts(pairs, { caption = "" } = {}) {
  const rows = pairs.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value)));
  return h("table", { class: "facts-table" }, caption ? h("caption", {}, caption) : null, h("tbody", {}, ...rows));
}

function findingRow(finding) {
  const place = finding.line ? `${finding.file}:${finding.line}` : finding.file;
  return h(
    "li",
    { class: `finding ${finding.severity === "error" ? "error" : "warning"}` },
    h("span", { class: "finding-head" }, h("code", {}, finding.code), h("span", { class: "place" }, place), h("span", { class: "severity" }, finding.severity)),
    h("span", { class: "finding-text" }, finding.path ? h("code", {}, finding.path) : null, finding.path ? " " : null, finding.message, finding.hint ? ` ${finding.hint}` : null),
  );
}

/** What the model sees of a row; what it learns is marked. */
function exampleBox({ line, pieces }) {
  const parts = pieces.map(({ text, learned }) => (learned ? h("mark", { class: "learned" }, text) : text));
  return h("figure", { class: "example" }, h("figcaption", {}, `line ${line}`), h("pre", { tabindex: "0", "aria-label": `The row of line ${line} as the model sees it` }, ...parts));
}

function histogram(counts) {
  const most = Math.max(1, ...counts);
  const rows = counts.map((number, power) => {
    const bar = h("progress", { max: most, value: number, "aria-label": `${number} samples` });
    return h("tr", {}, h("th", { scope: "row" }, `${2 ** power}${power ? ` to ${2 ** (power + 1) - 1}` : ""}`), h("td", { class: "bar-cell" }, bar), h("td", { class: "end" }, number.toLocaleString("en")));
  });
  return h("table", { class: "histogram" }, h("caption", {}, "Samples by number of tokens"), h("tbody", {}, ...rows));
}

/** `report`: as `POST /v1/files/ID/validate` answers with it. */
export function reportBox(report) {
  const findings = report.findings ?? [];
  const more = (report.errors ?? 0) + (report.warnings ?? 0) - findings.length;
  const pairs = [
    ["rows", `${count(report.rows ?? 0, "row")}, ${(report.usable_rows ?? 0).toLocaleString("en")} usable`],
    ["format", report.format || "none"],
  ];
  if (report.tokens && report.lengths) {
    const share = (100 * (report.supervised_share ?? 0)).toFixed(1);
    pairs.push(["tokens", `${report.tokens.toLocaleString("en")}, ${report.supervised_tokens.toLocaleString("en")} of them learned (${share} %)`]);
    const { median, p90, p99, longest } = report.lengths;
    pairs.push(["tokens of a sample", `median ${median}, 90 % up to ${p90}, 99 % up to ${p99}, longest ${longest}`]);
    pairs.push(["packing", `bins of ${report.max_tokens.toLocaleString("en")} tokens are filled to ${(100 * report.packing_efficiency).toFixed(1)} %`]);
  }
  if (report.labels?.length) pairs.push(["labels", report.labels.join(", ")]);
  if (report.template_digest) pairs.push(["chat template", report.template_digest.slice(0, 16)]);
  return h(
    "div",
    { class: "report" },
    h("p", { class: `verdict ${report.ok ? "good" : "bad"}` }, report.ok ? "A job may train on this file. " : "No job may train on this file. ", report.summary ?? ""),
    findings.length ? h("ol", { class: "findings", "aria-label": "Findings by line" }, ...findings.map(findingRow)) : null,
    more > 0 ? h("p", { class: "faint" }, `and ${count(more, "finding")} more`) : null,
    facts(pairs),
    report.length_histogram?.some(Boolean) ? histogram(report.length_histogram) : null,
    report.examples?.length ? h("h4", {}, "Rows as the model sees them; what it learns is ", h("mark", { class: "learned" }, "marked")) : null,
    ...(report.examples ?? []).map(exampleBox),
  );
}

/** `estimate`: as `POST /v1/fine_tuning/estimate` answers with it. What it does not know is not told. */
export function estimateBox(estimate) {
  const { steps, train_tokens: tokens, supervised_tokens: learned, seconds, peak_bytes_per_rank: peak, disk_bytes: disk } = estimate;
  const parts = Object.entries(estimate.memory_parts ?? {}).map(([name, size]) => [name.replaceAll("_", " "), bytes(size)]);
  const free = estimate.available_bytes_per_rank ? ` of ${bytes(estimate.available_bytes_per_rank)}` : "";
  const pairs = [
    ["steps", steps, () => steps.toLocaleString("en")],
    ["tokens", tokens, () => `${tokens.toLocaleString("en")}, ${(learned ?? 0).toLocaleString("en")} of them learned`],
    ["time", seconds, () => `${duration(seconds)} (${duration(estimate.seconds_low)} to ${duration(estimate.seconds_high)}${estimate.measured ? "" : ", not measured"})`],
    ["memory of a rank", peak, () => `${bytes(peak)}${free}`],
    ["disk", disk, () => `${bytes(disk)} of ${bytes(estimate.disk_free_bytes)} free`],
  ];
  const known = pairs.filter(([, value]) => value !== undefined).map(([name, , words]) => [name, words()]);
  return h(
    "div",
    { class: "report" },
    h("p", { class: `verdict ${estimate.allowed ? "good" : "bad"}` }, estimate.allowed ? "The job fits." : "The job does not fit."),
    estimate.findings?.length ? h("ol", { class: "findings", "aria-label": "Why" }, ...estimate.findings.map((item) => h("li", { class: "finding error" }, item.message))) : null,
    facts(known),
    parts.length ? facts(parts, { caption: "Memory of a rank by part" }) : null,
  );
}
