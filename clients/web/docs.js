/** The API reference: the server's own OpenAPI document as a page. Nothing here is written twice. */

import { Api, ApiError } from "./api.js";
import { byId, h } from "./dom.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

/** Where an operation without a tag belongs, and the order of the groups. */
const FAMILIES = [
  ["OpenAI", /^\/v1\/(chat|completions|embeddings|models|fine_tuning|files)/],
  ["Trilithon", /^\/v1\//],
  ["Megatron-LM", /^\/api$/],
  ["Administration", /^\/admin\//],
  ["Health", /^\/(livez|readyz|startupz|health|metrics)$/],
  ["Pages", /^/],
];

const slug = (method, path) => `${method}${path.replaceAll(/[^a-z0-9]+/gi, "-")}`.replace(/-$/, "");

/** `code` in backquotes becomes an element; everything else stays text. */
function prose(text) {
  return String(text).split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));
}

function paragraphs(text) {
  return String(text ?? "").split(/\n\s*\n/).filter((part) => part.trim()).map((part) => h("p", {}, ...prose(part.trim())));
}

class Schemas {
  constructor(document) {
    this.document = document;
  }

  /** Follow a local `$ref`; anything else comes back as it is. */
  resolve(schema) {
    if (!schema?.$ref?.startsWith("#/")) return schema ?? {};
    return schema.$ref.slice(2).split("/").reduce((node, key) => node?.[key], this.document) ?? {};
  }

  /** A type in a few words: "string", "array of integer", "one of a, b". */
  type(schema) {
    const name = schema?.$ref?.split("/").at(-1);
    const target = this.resolve(schema);
    if (target.enum) return target.enum.filter((value) => value !== null).map((value) => JSON.stringify(value)).join(" | ");
    if (target.const !== undefined) return JSON.stringify(target.const);
    const parts = target.anyOf ?? target.oneOf;
    if (parts) return name ?? [...new Set(parts.map((part) => this.type(part)).filter(Boolean))].join(" or ");
    if (target.type === "array") return `array of ${this.type(target.items ?? {})}`;
    if (name && target.type === "object") return name;
    return [target.type ?? "any"].flat().filter((type) => type !== "null").join(" or ");
  }

  get named() {
    return Object.entries(this.document.components?.schemas ?? {}).filter(([, schema]) => schema.properties);
  }

  /** A type's text with links to the shapes that it names. */
  linked(text) {
    const names = new Set(this.named.map(([name]) => name));
    return text.split(/\b/).map((word) => (names.has(word) ? h("a", { href: `#shape-${word}` }, word) : word));
  }

  /** What the schema says of its size, in words, or "". */
  bounds(schema) {
    const flatten = (part) => [this.resolve(part), ...(this.resolve(part).anyOf ?? []).flatMap(flatten)];
    const parts = flatten(schema);
    const find = (key) => parts.find((part) => part[key] !== undefined)?.[key];
    // A JavaScript number above 2^53 has lost its last digits.
    const shown = (value) => (value > Number.MAX_SAFE_INTEGER ? `2^${Math.round(Math.log2(value))} - 1` : value);
    const [low, above, high] = ["minimum", "exclusiveMinimum", "maximum"].map(find).map((value) => value && shown(value));
    const from = above !== undefined ? `above ${above}` : low !== undefined && high === undefined ? `at least ${low}` : low;
    if (from !== undefined && high !== undefined) return above !== undefined ? `${from}, at most ${high}` : `${from} to ${high}`;
    if (from !== undefined) return from;
    if (high !== undefined) return `at most ${high}`;
    const [items, length] = [find("maxItems"), find("maxLength")];
    if (items !== undefined) return `at most ${items} items`;
    return length === undefined ? "" : `at most ${length} characters`;
  }
}

function fieldTable(schemas, schema, caption) {
  const target = schemas.resolve(schema);
  const required = new Set(target.required ?? []);
  const rows = Object.entries(target.properties ?? {}).map(([name, property]) => {
    const described = schemas.resolve(property);
    const fallback = property.default ?? described.default;
    const facts = [schemas.bounds(property), fallback === undefined || fallback === null ? "" : `default ${JSON.stringify(fallback)}`];
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, h("code", {}, name), required.has(name) ? h("span", { class: "required" }, "required") : null),
      h("td", { class: "type" }, ...schemas.linked(schemas.type(property))),
      h("td", {}, ...prose(property.description ?? described.description ?? ""), h("span", { class: "limits" }, facts.filter(Boolean).join(", "))),
    );
  });
  if (!rows.length) return null;
  return h("table", { class: "fields" }, h("caption", {}, caption), h("tbody", {}, ...rows));
}

function bodyTables(schemas, content) {
  const tables = [];
  for (const [media, { schema }] of Object.entries(content ?? {})) {
    const target = schemas.resolve(schema);
    const variants = target.oneOf ?? target.anyOf ?? [schema];
    for (const variant of variants) {
      const table = fieldTable(schemas, variant, `Body, ${media}`);
      if (table) tables.push(table);
    }
  }
  return tables;
}

function operation(schemas, method, path, spec) {
  const parameters = (spec.parameters ?? []).map((parameter) => schemas.resolve(parameter));
  const parameterTable = parameters.length
    ? fieldTable(
        schemas,
        {
          properties: Object.fromEntries(parameters.map(({ name, schema, description }) => [name, { ...schema, description }])),
          required: parameters.filter(({ required }) => required).map(({ name }) => name),
        },
        "Parameters",
      )
    : null;
  return h(
    "section",
    { class: "operation", id: slug(method, path), "aria-labelledby": `${slug(method, path)}-title` },
    h(
      "h3",
      { id: `${slug(method, path)}-title` },
      h("a", { class: "anchor", href: `#${slug(method, path)}` }, h("span", { class: `method ${method}` }, method.toUpperCase()), " ", h("code", {}, path)),
    ),
    spec.summary ? h("p", { class: "summary" }, ...prose(spec.summary)) : null,
    ...paragraphs(spec.description),
    parameterTable,
    ...bodyTables(schemas, spec.requestBody && schemas.resolve(spec.requestBody).content),
    answers(schemas, spec.responses ?? {}),
  );
}

/** One line per answer, and all errors of the common shape on one. */
function answers(schemas, responses) {
  const isError = ([status]) => Number(status) >= 400;
  const lines = Object.entries(responses).filter((entry) => !isError(entry)).map(([status, response]) => {
    const types = Object.entries(schemas.resolve(response).content ?? {}).map(([media, { schema }]) =>
      h("span", { class: "answer" }, ...schemas.linked(schemas.type(schema)), h("span", { class: "limits" }, media)),
    );
    return h("tr", {}, h("th", { scope: "row" }, h("code", {}, status)), h("td", {}, ...types));
  });
  const errors = Object.entries(responses).filter(isError);
  if (errors.length) {
    const marks = errors.map(([status, response]) => h("code", { title: schemas.resolve(response).description ?? "" }, status));
    lines.push(h("tr", {}, h("th", { scope: "row" }, "errors"), h("td", { class: "statuses" }, ...marks, ...schemas.linked("Error"))));
  }
  return h("table", { class: "fields responses" }, h("caption", {}, "Answers"), h("tbody", {}, ...lines));
}

/** What each error status means, once for all operations. */
function errorSection(schemas, document) {
  const meanings = new Map();
  for (const item of Object.values(document.paths ?? {})) {
    for (const spec of Object.values(item)) {
      for (const [status, response] of Object.entries(spec.responses ?? {})) {
        if (Number(status) >= 400) meanings.set(status, schemas.resolve(response).description ?? "");
      }
    }
  }
  const rows = [...meanings].sort().map(([status, meaning]) =>
    h("tr", {}, h("th", { scope: "row" }, h("code", {}, status)), h("td", {}, ...prose(meaning))),
  );
  return h("section", { class: "tag", id: "errors" }, h("h2", {}, "Errors"), h("table", { class: "fields responses" }, h("tbody", {}, ...rows)));
}

function shapeSection(schemas) {
  const requests = /Request$/;
  const shapes = schemas.named.filter(([name]) => !requests.test(name)).map(([name, schema]) =>
    h("section", { class: "operation shape", id: `shape-${name}` }, h("h3", {}, h("code", {}, name)), ...paragraphs(schema.description), fieldTable(schemas, schema, "Fields")),
  );
  return h("section", { class: "tag" }, h("h2", {}, "Shapes"), ...shapes);
}

/** Tag -> [{method, path, spec}], in the order of the document. */
function byTag(document) {
  const names = [...(document.tags ?? []).map(({ name }) => name), ...FAMILIES.map(([name]) => name)];
  const groups = new Map(names.map((name) => [name, []]));
  for (const [path, item] of Object.entries(document.paths ?? {})) {
    for (const method of METHODS) {
      if (!item[method]) continue;
      const spec = { ...item[method], parameters: [...(item.parameters ?? []), ...(item[method].parameters ?? [])] };
      const tag = spec.tags?.[0] ?? FAMILIES.find(([, pattern]) => pattern.test(path))[0];
      groups.get(tag).push({ method, path, spec });
    }
  }
  return new Map([...groups].filter(([, operations]) => operations.length));
}

function render(document) {
  const schemas = new Schemas(document);
  const groups = byTag(document);
  const title = h("div", { class: "head" }, h("h1", {}, document.info?.title ?? "API"), h("p", { class: "version" }, document.info?.version ?? ""));
  const sections = [...groups].map(([tag, operations]) => {
    const about = document.tags?.find(({ name }) => name === tag)?.description;
    return h("section", { class: "tag" }, h("h2", {}, tag), ...paragraphs(about), ...operations.map(({ method, path, spec }) => operation(schemas, method, path, spec)));
  });
  sections.push(errorSection(schemas, document), shapeSection(schemas));
  byId("reference").replaceChildren(title, ...paragraphs(document.info?.description), ...sections);
  byId("contents").replaceChildren(
    ...[...groups].map(([tag, operations]) =>
      h(
        "section",
        {},
        h("h2", {}, tag),
        h(
          "ul",
          {},
          ...operations.map(({ method, path }) =>
            h("li", {}, h("a", { href: `#${slug(method, path)}` }, h("span", { class: `method ${method}` }, method.toUpperCase()), h("code", {}, path))),
          ),
        ),
      ),
    ),
  );
  if (location.hash) window.document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

/** Hide what does not contain every word of the filter. */
function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (element) => words.every((word) => element.textContent.toLowerCase().includes(word));
  for (const section of document.querySelectorAll(".operation")) section.hidden = !matches(section);
  for (const tag of document.querySelectorAll(".tag")) tag.hidden = !tag.querySelector(".operation:not([hidden])");
  for (const link of document.querySelectorAll(".contents a")) {
    link.parentElement.hidden = byId(decodeURIComponent(link.hash.slice(1)))?.hidden ?? false;
  }
}

const api = new Api();

async function load() {
  try {
    render(await api.json("/openapi.json"));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    const key = h("input", { type: "password", id: "key", autocomplete: "off", "aria-label": "API key", placeholder: "API key" });
    const form = h("form", { class: "key-form" }, key, h("button", { class: "primary", type: "submit" }, "Open"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      api.key = key.value;
      load();
    });
    byId("reference").replaceChildren(
      h("div", { class: "failure", role: "alert" }, h("p", { class: "failure-head" }, h("code", {}, error.code)), h("p", { class: "failure-text" }, error.message)),
      error.status === 401 ? form : "",
    );
  }
}

byId("find").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", ({ target }) => filter(target.value));
await load();
