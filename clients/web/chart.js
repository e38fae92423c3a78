/**
 * The curves of a job as one SVG that grows with its events.
 *
 *     loss            training and validation, over the same steps as the panels below
 *     learning rate
 *     throughput
 *
 * Dashed verticals are where a new attempt began, ticks on the step axis are checkpoints. Every number is drawn as it
 * came: nothing is smoothed, and a step whose loss was no number is a gap in the line.
 */

import { h } from "./dom.js";
import { drawn, rankOf, scale, short, ticks } from "./scales.js";

const LEFT = 58;
const RIGHT = 14;
const TOP = 24;
const GAP = 34;
const BOTTOM = 40;

export const PANELS = [
  {
    title: "loss",
    height: 210,
    curves: [
      { column: "train_loss", label: "training" },
      { column: "valid_loss", label: "validation", dots: true },
    ],
  },
  { title: "learning rate", height: 72, curves: [{ column: "lr", label: "learning rate" }] },
  { title: "tokens per second", height: 72, curves: [{ column: "tokens_per_second", label: "tokens per second" }] },
];

const HEIGHT = TOP + PANELS.reduce((sum, { height }) => sum + height, 0) + GAP * (PANELS.length - 1) + BOTTOM;
const CURVES = PANELS.flatMap(({ curves }) => curves);

function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

const text = (x, y, words, kind) => s("text", { x: x.toFixed(1), y: y.toFixed(1), class: kind }, words);
const line = (d, kind) => s("path", { d, class: kind });

export class Chart {
  #rows = new Map(); // step -> the numbers of that step by column
  #steps = []; // ascending
  #columns = new Set(); // that any step has
  #first = null; // the first attempt that told of a step
  #attempts = new Map(); // a later attempt -> its first step
  #checkpoints = [];
  #cursor = null; // index in #steps, or null: the newest
  #frame = 0;
  #width = 0;
  #across = null;
  #up = new Map();

  #title = s("title", { id: "chart-title" });
  #desc = s("desc", { id: "chart-desc" }, "No steps yet.");
  #plot = s("g");
  #marks = s("g", { class: "cursor" });
  #svg = s("svg", { role: "img", "aria-labelledby": "chart-title chart-desc", height: HEIGHT }, this.#title, this.#desc, this.#plot, this.#marks);
  #readout = h("p", { class: "readout", id: "chart-readout" });
  #box = h(
    "div",
    { class: "chart", tabindex: "0", role: "group", "aria-label": "Curves by step. Arrow keys read them step by step.", "aria-describedby": "chart-readout" },
    this.#svg,
  );

  constructor(title) {
    this.#title.textContent = title;
    this.element = h("figure", { class: "curves" }, this.#box, this.#readout);
    this.#svg.addEventListener("pointermove", (event) => this.#point(event));
    this.#svg.addEventListener("pointerleave", () => this.#look(null));
    this.#box.addEventListener("keydown", (event) => this.#key(event));
    this.#box.addEventListener("blur", () => this.#look(null));
    this.observer = new ResizeObserver(([{ contentRect }]) => {
      this.#width = Math.round(contentRect.width);
      this.#later();
    });
    this.observer.observe(this.#box);
    this.#later();
  }

  close() {
    this.observer.disconnect();
    cancelAnimationFrame(this.#frame);
  }

  /** Numbers of a step; those of a step that was repeated after a resume count as they were seen last. */
  add(step, numbers) {
    const known = this.#rows.get(step);
    if (!known) this.#steps.splice(rankOf(this.#steps, step), 0, step);
    this.#rows.set(step, { ...known, ...numbers });
    for (const column of Object.keys(numbers)) this.#columns.add(column);
    this.#later();
  }

  /** Attempt `number` told of this step. Where the first one that told of any began is no border. */
  attempt(number, step) {
    this.#first ??= number;
    if (number === this.#first || this.#attempts.has(number)) return;
    this.#attempts.set(number, step);
    this.#later();
  }

  set checkpoints(steps) {
    this.#checkpoints = steps;
    this.#later();
  }

  #later() {
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  // Drawing --------------------------------------------------------------------------------------------------

  #draw() {
    this.#frame = 0;
    if (!this.#width) return;
    const [first, last] = this.#steps.length ? [this.#steps[0], this.#steps.at(-1)] : [0, 1];
    const [low, high] = first === last ? [first - 1, last + 1] : [first, last];
    this.#svg.setAttribute("width", this.#width);
    this.#svg.setAttribute("viewBox", `0 0 ${this.#width} ${HEIGHT}`);
    this.#across = scale(low, high, LEFT, this.#width - RIGHT);
    this.#plot.replaceChildren();
    let top = TOP;
    for (const panel of PANELS) {
      this.#panel(panel, top);
      top += panel.height + GAP;
    }
    this.#axis(low, high, top - GAP);
    this.#desc.textContent = this.#inWords();
    this.#showCursor();
  }

  /** The values of a column as [step, value], with null where a step's number was none. */
  #points(column) {
    return this.#steps.filter((step) => column in this.#rows.get(step)).map((step) => [step, this.#rows.get(step)[column]]);
  }

  #panel({ title, height, curves }, top) {
    const bottom = top + height;
    const series = curves.map((curve) => [curve, this.#points(curve.column)]).filter(([, points]) => points.length);
    const values = series.flatMap(([, points]) => points.map(([, value]) => value)).filter((value) => value !== null);
    const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
    const marks = values.length ? ticks(low, high, { count: height > 100 ? 5 : 2 }) : [0, 1];
    const up = scale(marks[0], marks.at(-1), bottom, top);
    for (const mark of marks) {
      this.#plot.append(line(`M${LEFT} ${up(mark).toFixed(1)}H${this.#width - RIGHT}`, "grid"));
      if (values.length) this.#plot.append(text(LEFT - 8, up(mark) + 4, short(mark), "tick end"));
    }
    for (const step of this.#attempts.values()) this.#plot.append(line(`M${this.#across(step).toFixed(1)} ${top}V${bottom}`, "attempt"));
    this.#plot.append(text(LEFT, top - 9, values.length ? title : `${title}: nothing yet`, "panel"));
    let x = LEFT + 12 + 7 * title.length;
    for (const [curve, points] of series) {
      this.#up.set(curve.column, up);
      if (series.length > 1 || curve.dots) {
        this.#plot.append(line(`M${x} ${top - 13}h14`, `curve ${curve.column}`), text(x + 19, top - 9, curve.label, "panel"));
        x += 36 + 7 * curve.label.length;
      }
      this.#curve(curve, points, up);
    }
  }

  #curve({ column, dots }, points, up) {
    const parts = [[]];
    for (const [step, value] of points) {
      if (value === null) parts.push([]);
      else parts.at(-1).push([this.#across(step), up(value)]);
    }
    const kept = parts.map(drawn);
    const d = kept.filter((part) => part.length > 1).map((part) => `M${part.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`);
    if (d.length) this.#plot.append(line(d.join(""), `curve ${column}`));
    const single = kept.filter((part) => dots || part.length === 1).flat();
    this.#plot.append(...single.map(([x, y]) => s("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 2.5, class: `dot ${column}` })));
  }

  #axis(low, high, y) {
    this.#plot.append(line(`M${LEFT} ${y}H${this.#width - RIGHT}`, "axis"), text(this.#width - RIGHT, y + 33, "step", "tick end"));
    const marks = this.#steps.length ? ticks(low, high, { count: this.#width > 520 ? 8 : 4, whole: true }) : [];
    for (const mark of marks.filter((value) => value >= Math.max(0, low) && value <= high)) {
      this.#plot.append(line(`M${this.#across(mark).toFixed(1)} ${y}v5`, "axis"), text(this.#across(mark), y + 18, short(mark), "tick middle"));
    }
    for (const step of this.#checkpoints.filter((value) => value >= low && value <= high)) {
      this.#plot.append(line(`M${this.#across(step).toFixed(1)} ${y}v-8`, "checkpoint"));
    }
    const legend = [];
    if (this.#checkpoints.length) legend.push(["checkpoint", `M0 ${y + 33}v-8`, "checkpoint"]);
    if (this.#attempts.size) legend.push(["new attempt", `M0 ${y + 35}v-12`, "attempt"]);
    legend.forEach(([words, d, kind], index) => {
      const group = s("g", { transform: `translate(${LEFT + 1 + index * 100} 0)` }, line(d, kind), text(8, y + 33, words, "tick"));
      this.#plot.append(group);
    });
  }

  /** What somebody who cannot see the picture is told. */
  #inWords() {
    const sentences = CURVES.map(({ column, label }) => {
      const points = this.#points(column).filter(([, value]) => value !== null);
      if (!points.length) return "";
      const [[firstStep, first], [lastStep, last]] = [points[0], points.at(-1)];
      const name = column.endsWith("loss") ? `${label} loss` : label;
      return `${name}: ${short(first)} at step ${firstStep}, ${short(last)} at step ${lastStep}.`;
    }).filter(Boolean);
    if (!sentences.length) return "No steps yet.";
    const marks = this.#checkpoints.length ? [`Checkpoints at steps ${this.#checkpoints.slice(0, 20).join(", ")}.`] : [];
    const borders = [...this.#attempts].map(([number, step]) => `Attempt ${number} began at step ${step}.`);
    return [...sentences, ...marks, ...borders].join(" ");
  }

  // Reading --------------------------------------------------------------------------------------------------

  #point({ clientX }) {
    if (!this.#steps.length || !this.#across) return;
    const x = clientX - this.#svg.getBoundingClientRect().left;
    const right = Math.min(this.#steps.length - 1, this.#firstFrom(x));
    const left = Math.max(0, right - 1);
    const away = (index) => Math.abs(this.#across(this.#steps[index]) - x);
    this.#look(away(left) < away(right) ? left : right);
  }

  /** The first step that is drawn at `x` or right of it. */
  #firstFrom(x) {
    const [low, high] = [this.#steps[0], this.#steps.at(-1)];
    const [start, end] = [this.#across(low), this.#across(high)];
    return start === end ? 0 : rankOf(this.#steps, low + ((x - start) / (end - start)) * (high - low));
  }

  #key(event) {
    const last = this.#steps.length - 1;
    const now = this.#cursor ?? last;
    const far = Math.max(1, Math.round(last / 20));
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, PageDown: now - far, PageUp: now + far, Home: 0, End: last };
    if (event.key === "Escape") this.#look(null);
    else if (event.key in moves && last >= 0) {
      event.preventDefault();
      // Read out only what was asked for: a live region would otherwise speak at every step of the job.
      this.#readout.setAttribute("aria-live", "polite");
      this.#look(Math.min(last, Math.max(0, moves[event.key])));
    }
  }

  #look(index) {
    if (index === null) this.#readout.removeAttribute("aria-live");
    this.#cursor = index;
    this.#showCursor();
  }

  #showCursor() {
    this.#marks.replaceChildren();
    if (!this.#steps.length) {
      this.#readout.replaceChildren(h("span", {}, "No steps yet."));
      return;
    }
    const index = this.#cursor ?? this.#steps.length - 1;
    const step = this.#steps[index];
    const row = this.#rows.get(step);
    const facts = [h("b", {}, `step ${step.toLocaleString("en")}`)];
    for (const { column, label } of CURVES.filter((curve) => this.#columns.has(curve.column))) {
      const at = column in row ? step : this.#before(index, column);
      if (at === null) continue;
      const value = this.#rows.get(at)[column];
      const shown = value === null ? "not a number" : short(value, 5);
      facts.push(h("span", { class: `fact ${column}` }, `${label} ${shown}${at === step ? "" : ` (step ${at})`}`));
    }
    if (this.#checkpoints.includes(step)) facts.push(h("span", {}, "checkpoint"));
    this.#readout.replaceChildren(...facts);
    if (this.#cursor === null || !this.#across) return;
    const x = this.#across(step).toFixed(1);
    this.#marks.append(line(`M${x} ${TOP}V${HEIGHT - BOTTOM}`, "rule"));
    for (const { column } of CURVES) {
      const value = row[column];
      if (value !== null && value !== undefined) this.#marks.append(s("circle", { cx: x, cy: this.#up.get(column)(value).toFixed(1), r: 3.5, class: `dot ${column}` }));
    }
  }

  /** The newest step before that index which has the column: validations are rarer than steps. */
  #before(index, column) {
    for (let i = index - 1; i >= 0; i -= 1) if (column in this.#rows.get(this.#steps[i])) return this.#steps[i];
    return null;
  }
}
