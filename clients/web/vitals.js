/** Load and readiness in the header: read from /metrics and /readyz while the page is visible, and at rest when not. */

import { byId, seconds } from "./dom.js";
import { showReadiness } from "./ready.js";

const PERIOD_MS = 2000;
const BUSY_PERIOD_MS = 700;
const NUM_POINTS = 40;

/** Prometheus text -> Map of name -> sum over labels. Labels are kept apart by nobody here. */
export function parseMetrics(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-z_:][a-z0-9_:]*)(?:\{.*\})? (\S+)/i.exec(line);
    if (!match) continue;
    const value = Number(match[2]);
    if (Number.isFinite(value)) sums.set(match[1], (sums.get(match[1]) ?? 0) + value);
  }
  return sums;
}

export class Vitals {
  #api;
  #timer = 0;
  #busy = false;
  #last = null;
  #points = [];
  #polling = false;

  constructor(api) {
    this.#api = api;
    document.addEventListener("visibilitychange", () => this.#schedule(0));
  }

  start() {
    this.#schedule(0);
  }

  set busy(value) {
    this.#busy = value;
    this.#schedule(value ? BUSY_PERIOD_MS : PERIOD_MS);
  }

  /** What this page measured of its own answer. */
  answer({ ttft, rate }) {
    byId("vital-ttft").textContent = ttft === null ? "\u2013" : seconds(ttft);
    byId("vital-rate").textContent = rate === null ? "\u2013" : `${rate.toFixed(1)} tok/s`;
  }

  #schedule(delay) {
    clearTimeout(this.#timer);
    if (document.hidden) {
      this.#last = null;
      return;
    }
    this.#timer = setTimeout(() => this.#poll(), delay);
  }

  async #poll() {
    if (this.#polling) return;
    this.#polling = true;
    try {
      await Promise.all([showReadiness(this.#api), this.#metrics()]);
    } finally {
      this.#polling = false;
      this.#schedule(this.#busy ? BUSY_PERIOD_MS : PERIOD_MS);
    }
  }

  async #metrics() {
    let sums;
    try {
      sums = parseMetrics(await this.#api.text("/metrics"));
    } catch {
      this.#last = null;
      for (const id of ["vital-server", "vital-running", "vital-waiting", "vital-kv"]) byId(id).textContent = "\u2013";
      return;
    }
    const now = performance.now();
    // Counted per step, so it moves while requests run; counters of requests move when they end.
    const computed = sums.get("trilithon_step_tokens_sum") ?? 0;
    if (this.#last) {
      const rate = Math.max(0, ((computed - this.#last.computed) * 1000) / (now - this.#last.now));
      byId("vital-server").textContent = `${rate.toFixed(rate < 100 ? 1 : 0)} tok/s`;
      this.#points = [...this.#points, rate].slice(-NUM_POINTS);
      this.#draw();
    }
    this.#last = { now, computed };
    for (const name of ["running", "waiting"]) {
      byId(`vital-${name}`).textContent = sums.get(`trilithon_requests_${name}`) ?? "\u2013";
    }
    const ratio = sums.get("trilithon_kv_usage_ratio");
    byId("vital-kv").textContent = ratio === undefined ? "\u2013" : `${(ratio * 100).toFixed(ratio < 0.1 ? 1 : 0)} %`;
  }

  #draw() {
    const top = Math.max(1, ...this.#points);
    const step = 60 / (NUM_POINTS - 1);
    const start = NUM_POINTS - this.#points.length;
    const points = this.#points.map((rate, index) => `${((start + index) * step).toFixed(1)},${(15 - (rate / top) * 14).toFixed(1)}`);
    byId("spark").firstElementChild.setAttribute("points", points.join(" "));
  }
}
