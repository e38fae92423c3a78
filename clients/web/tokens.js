/**
 * An answer as its tokens, each coloured by the probability that the model gave it, with the alternatives in a popover.
 *
 * One tab stop for the whole strip: arrows move between tokens, up and down between lines, Home and End to the ends,
 * Escape closes the popover.
 */

import { byId, h, percent } from "./dom.js";

/** Lower bounds of the classes p0 (likely, no colour) to p6 (very unlikely). */
export const BINS = [0.9, 0.6, 0.35, 0.15, 0.05, 0.01, 0];
const BIN_LABELS = ["90 %", "60 %", "35 %", "15 %", "5 %", "1 %", "less"];

export function binOf(probability) {
  return BINS.findIndex((bound) => probability >= bound);
}

export function legend() {
  const swatches = BINS.map((_, bin) => h("li", {}, h("span", { class: `swatch p${bin}`, "aria-hidden": "true" }), BIN_LABELS[bin]));
  return h("ul", { class: "legend", "aria-label": "What the colours mean" }, h("li", {}, "probability from"), ...swatches);
}

/** Spaces and line breaks made visible, for the popover and for labels. */
export function visible(text) {
  return text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
}

const popover = {
  owner: null,
  close() {
    const element = byId("popover");
    if (element.matches(":popover-open")) element.hidePopover();
    this.owner?.classList.remove("active");
    this.owner = null;
  },
  open(span, token) {
    this.close();
    const element = byId("popover");
    element.replaceChildren(...describe(token));
    element.showPopover();
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { width, height } = element.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left - 8, innerWidth - width - 8));
    const below = at.bottom + 6;
    const top = below + height > innerHeight - 8 ? Math.max(8, at.top - height - 6) : below;
    element.style.setProperty("left", `${left}px`);
    element.style.setProperty("top", `${top}px`);
    span.classList.add("active");
    this.owner = span;
  },
};

export const closePopover = () => popover.close();

function describe(token) {
  const rank = token.top.findIndex((other) => other.token === token.token);
  const where = rank >= 0 ? `rank ${rank + 1}` : token.top.length ? `beyond rank ${token.top.length}` : "";
  const head = h(
    "div",
    { class: "popover-head" },
    h("code", {}, visible(token.token)),
    h("span", {}, token.logprob === null ? "first token, no probability" : `${percent(Math.exp(token.logprob))}`),
    h("span", { class: "faint" }, token.logprob === null ? "" : `ln ${token.logprob.toFixed(3)}`),
    h("span", { class: "faint" }, where),
  );
  if (!token.top.length) return [head];
  const rows = token.top.map((other) => {
    const bar = h("i", { class: "share" });
    bar.style.setProperty("width", `${Math.max(1, Math.exp(other.logprob) * 100)}%`);
    return h(
      "tr",
      { class: other.token === token.token ? "chosen" : null },
      h("td", {}, h("code", {}, visible(other.token))),
      h("td", { class: "track" }, bar),
      h("td", {}, percent(Math.exp(other.logprob))),
    );
  });
  return [head, h("table", { "aria-label": "Most likely tokens here" }, h("tbody", {}, ...rows))];
}

let numStrips = 0;

/**
 * Which part of a text each of its tokens shows. The text is what counts: a token that is no part of it (special, cut by
 * a stop string, half a character, held back until the next one) shows nothing, and what is left over goes to the last.
 */
function share(text, tokens) {
  let at = 0;
  return tokens.map(({ token }, index) => {
    const isLast = index === tokens.length - 1;
    const piece = isLast ? text.slice(at) : text.startsWith(token, at) ? token : "";
    at += piece.length;
    return piece;
  });
}

export class TokenStrip {
  #tokens = [];
  #active = -1;
  #id = `strip-${(numStrips += 1)}`;

  constructor(label) {
    this.element = h("div", { class: "tokens", role: "listbox", tabindex: "0", "aria-label": label, "aria-orientation": "horizontal" });
    this.element.addEventListener("keydown", (event) => this.#onKey(event));
    this.element.addEventListener("pointerover", (event) => this.#onPointer(event));
    this.element.addEventListener("pointerleave", () => this.#hide());
    this.element.addEventListener("click", (event) => this.#onPointer(event));
    this.element.addEventListener("blur", () => this.#hide());
    this.element.addEventListener("focus", () => {
      if (this.element.matches(":focus-visible")) this.#show(Math.max(0, this.#active));
    });
  }

  get length() {
    return this.#tokens.length;
  }

  /** Sum of log-probabilities and how many there are, for the perplexity line. */
  get score() {
    const known = this.#tokens.filter((token) => token.logprob !== null);
    return { sum: known.reduce((sum, token) => sum + token.logprob, 0), count: known.length };
  }

  /** Add a piece of the answer's text with the tokens that made it: {token, logprob, top: [{token, logprob}]}. */
  append(text, tokens) {
    const fragment = document.createDocumentFragment();
    const pieces = share(text, tokens);
    for (const [offset, token] of tokens.entries()) {
      const index = this.#tokens.push(token) - 1;
      const bin = token.logprob === null ? 0 : binOf(Math.exp(token.logprob));
      const label = token.logprob === null ? visible(token.token) : `${visible(token.token)}, ${percent(Math.exp(token.logprob))}`;
      const span = h("span", { class: "t", role: "option", id: `${this.#id}-${index}`, "aria-label": label, "data-index": index });
      // A leading space stays uncoloured, so that words stand apart and no sliver of colour hangs at a line's end.
      const [, space, rest] = /^( *)([^]*)$/.exec(pieces[offset]);
      const ink = `ink p${bin}`;
      if (rest) span.append(space, h("span", { class: rest.includes("\n") ? `${ink} nl` : ink }, rest));
      else span.append(h("span", { class: ink }, space));
      fragment.append(span);
    }
    if (!tokens.length) fragment.append(text);
    this.element.append(fragment);
  }

  #onPointer(event) {
    const span = event.target.closest("[data-index]");
    if (span) this.#show(Number(span.dataset.index));
  }

  #hide() {
    popover.close();
  }

  #show(index) {
    const span = this.element.children[index];
    if (!span) return;
    this.element.children[this.#active]?.removeAttribute("aria-selected");
    this.#active = index;
    span.setAttribute("aria-selected", "true");
    this.element.setAttribute("aria-activedescendant", span.id);
    popover.open(span, this.#tokens[index]);
  }

  #onKey(event) {
    const last = this.#tokens.length - 1;
    const moves = {
      ArrowRight: () => Math.min(last, this.#active + 1),
      ArrowLeft: () => Math.max(0, this.#active - 1),
      ArrowDown: () => this.#line(1),
      ArrowUp: () => this.#line(-1),
      Home: () => 0,
      End: () => last,
    };
    if (event.key === "Escape" && popover.owner) {
      popover.close();
      event.stopPropagation();
      return;
    }
    const move = moves[event.key];
    if (!move || last < 0) return;
    event.preventDefault();
    const index = move();
    this.element.children[index].scrollIntoView({ block: "nearest" });
    this.#show(index);
  }

  /** The token of the next (or previous) line that is nearest below (or above) the active one. */
  #line(direction) {
    const here = this.element.children[this.#active]?.getBoundingClientRect();
    if (!here) return 0;
    let best = this.#active;
    let distance = Infinity;
    let row = null;
    for (let index = this.#active + direction; this.element.children[index]; index += direction) {
      const there = this.element.children[index].getClientRects()[0];
      if (!there || Math.abs(there.top - here.top) < 4) continue;
      row ??= there.top;
      if (Math.abs(there.top - row) > 4) break;
      if (Math.abs(there.left - here.left) < distance) [best, distance] = [index, Math.abs(there.left - here.left)];
    }
    return best;
  }
}
