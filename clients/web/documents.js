/** Documents that go with a request: texts and html pages, written into the page or read from files. */

import { fit, h } from "./dom.js";

const isHtml = (name) => /\.html?$/i.test(name);

export class Documents {
  #list = h("ol", { class: "documents" });
  #number = 0;

  constructor() {
    const files = h("input", { type: "file", class: "sr", id: "document-files", multiple: true, accept: ".txt,.md,.html,.htm" });
    files.addEventListener("change", () => this.#read(files));
    this.element = h(
      "div",
      {},
      this.#list,
      h(
        "div",
        { class: "field-actions" },
        h("button", { type: "button", class: "quiet", id: "add-document", onclick: () => this.add().focus() }, "Add a text"),
        h("label", { class: "quiet as-button", for: "document-files" }, "Add files"),
        files,
      ),
    );
  }

  /** One more document; its text area. */
  add({ name = "", text = "", html = false } = {}) {
    this.#number += 1;
    const id = name || `document ${this.#number}`;
    const area = h("textarea", { rows: 3, "aria-label": `Text of ${id}`, placeholder: "Text" });
    area.value = text;
    const item = h("li", { "data-id": id, "data-html": html }, h("div", { class: "document-head" }, h("code", {}, id), h("button", { type: "button", class: "quiet", "aria-label": `Remove ${id}`, onclick: () => item.remove() }, "Remove")), area);
    area.addEventListener("input", () => fit(area));
    this.#list.append(item);
    fit(area);
    return area;
  }

  async #read(input) {
    for (const file of input.files) this.add({ name: file.name, text: await file.text(), html: isHtml(file.name) });
    input.value = "";
  }

  /** As the API takes them; empty ones are left out. */
  get values() {
    return [...this.#list.children]
      .map((item) => [item, item.querySelector("textarea").value])
      .filter(([, text]) => text.trim())
      .map(([item, text]) => ({ id: item.dataset.id, ["html" in item.dataset ? "html" : "text"]: text }));
  }
}
