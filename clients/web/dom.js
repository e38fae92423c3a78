/** Small helpers over the DOM. Text only ever enters as text nodes, so nothing a model writes is read as HTML. */

/**
 * Make an element.
 *
 * h("button", {class: "quiet", type: "button", onclick: stop}, "Stop")
 *
 * Keys that start with "on" become listeners; null and false leave the attribute out; true sets it empty.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Copy to the clipboard; falls back to a selection where the clipboard is closed (plain http on another host). */
export async function copyText(text, button) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "sr", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
  }
  const label = button.textContent;
  button.textContent = copied ? "Copied" : "Not copied";
  setTimeout(() => (button.textContent = label), 1200);
}

/** Let a text area be as high as its text, within limits that the style sheet sets. */
export function fit(area) {
  area.style.setProperty("height", "auto");
  area.style.setProperty("height", `${area.scrollHeight + 2}px`);
}

/** 0.1234 -> "123 ms", 12.3 -> "12.3 s". */
export function seconds(value) {
  return value < 0.9995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

/** A probability with as many digits as are worth reading. */
export function percent(probability) {
  const value = probability * 100;
  if (value >= 99.95) return "100 %";
  if (value >= 10) return `${value.toFixed(1)} %`;
  if (value >= 0.01) return `${value.toFixed(2)} %`;
  return "<0.01 %";
}
