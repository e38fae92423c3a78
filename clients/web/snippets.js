/** The request on screen as code that can be pasted: curl, the openai package, the Trilithon client. */

/** Keyword arguments of `create()` in the openai package; everything else travels in `extra_body`. */
const OPENAI_ARGUMENTS = new Set([
  "model", "messages", "prompt", "stream", "stream_options", "temperature", "top_p", "max_tokens", "stop", "seed", "n",
  "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format", "echo",
]);

const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A JSON value as a Python literal, broken over lines where it is long. */
export function python(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList ? value.map((item) => [null, item]) : Object.entries(value);
  const render = (inner) => items.map(([key, item]) => `${key === null ? "" : `${JSON.stringify(key)}: `}${python(item, inner)}`);
  const [open, close] = isList ? "[]" : "{}";
  const flat = `${open}${render("").join(", ")}${close}`;
  if (flat.length + indent.length <= 76 && !flat.includes("\n")) return flat;
  const inner = `${indent}    `;
  return `${open}\n${render(inner).map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

/** A seed above 2^53 travels as a string of digits; Python has whole numbers of any size. */
const literal = (name, value, indent) => (name === "seed" && /^\d+$/.test(value) ? value : python(value, indent));
const keywords = (entries, indent) => entries.map(([name, value]) => `${indent}${name}=${literal(name, value, indent)},\n`).join("");

function curl({ origin, path, body, hasKey }) {
  const key = hasKey ? ' \\\n  -H "Authorization: Bearer $TRILITHON_API_KEY"' : "";
  const stream = body.stream ? " -N" : "";
  return `curl${stream} ${origin}${path} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${shellQuote(JSON.stringify(body, null, 2))}\n`;
}

function openai({ origin, path, body, hasKey }) {
  const chat = path.includes("chat");
  const entries = Object.entries(body);
  const extra = Object.fromEntries(entries.filter(([name]) => !OPENAI_ARGUMENTS.has(name)));
  const own = entries.filter(([name]) => OPENAI_ARGUMENTS.has(name));
  if (Object.keys(extra).length) own.push(["extra_body", extra]);
  const key = hasKey ? 'os.environ["TRILITHON_API_KEY"]' : '"none"';
  const piece = chat ? 'chunk.choices[0].delta.content or ""' : "chunk.choices[0].text";
  const read = body.stream
    ? `for chunk in answer:
    if chunk.choices:
        print(${piece}, end="", flush=True)`
    : `print(answer.choices[0].text)`;
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${key})
answer = client.${chat ? "chat.completions" : "completions"}.create(
${keywords(own, "    ")})
${read}
`;
}

function trilithon({ origin, path, body, hasKey }) {
  const { messages, prompt, stream_options: _usage, stream: _stream, top_logprobs, response_format, ...rest } = body;
  const chat = path.includes("chat");
  if (chat && rest.logprobs === true) rest.logprobs = top_logprobs;
  const schema = response_format?.json_schema?.schema;
  if (schema) rest.constraint = { json_schema: schema };
  else if (response_format) rest.constraint = { json_object: true };
  const key = hasKey ? ', api_key=os.environ["TRILITHON_API_KEY"]' : "";
  return `${hasKey ? "import os\n\n" : ""}from trilithon import Client

with Client("${origin}"${key}) as client:
    for event in client.${chat ? "chat" : "generate"}(
        ${python(chat ? messages : prompt, "        ")},
${keywords([...Object.entries(rest), ["stream", true]], "        ")}    ):
        print(event.text, end="", flush=True)
`;
}

const LANGUAGES = { curl, openai, trilithon };

/** `body` is exactly what the page would send. The key itself never enters a snippet. */
export function snippet(language, { origin, path, body, hasKey }) {
  return LANGUAGES[language]({ origin, path, body, hasKey });
}
