/** The server's HTTP contract: JSON in, JSON or server-sent events out, one error body everywhere. */

/** What the server refused or failed at, with the fields of its error body. */
export class ApiError extends Error {
  constructor({ message, code, status = 0, requestId = "", details = [], retryAfter = "" }) {
    super(message);
    this.name = "ApiError";
    this.code = code;
    this.status = status;
    this.requestId = requestId;
    this.details = details;
    this.retryAfter = retryAfter;
  }
}

function errorFromBody(body, { status, requestId, retryAfter }) {
  const error = body?.error ?? {};
  return new ApiError({
    message: error.message ?? body?.reason ?? `The server answered with status ${status}.`,
    code: error.code ?? `http_${status}`,
    status,
    requestId: error.request_id ?? requestId,
    details: Array.isArray(error.details) ? error.details : [],
    retryAfter,
  });
}

/**
 * Split a stream of text into server-sent events. Comments (": ping") and unknown fields are skipped.
 * Yields {event, data, id}; `id` is the last one that was given.
 */
export async function* readEvents(chunks) {
  let buffer = "";
  let event = "";
  let id = "";
  let data = [];
  for await (const chunk of chunks) {
    buffer += chunk;
    const lines = buffer.split(/\r\n|\n/);
    buffer = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield { event: event || "message", data: data.join("\n"), id };
        event = "";
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      } else if (line.startsWith("event:")) {
        event = line.slice(6).trim();
      } else if (line.startsWith("id:")) {
        id = line.slice(3).trim();
      }
    }
  }
}

/** The text of a body in pieces. After `silenceMs` without any, it ends: nobody is at the other end of the line. */
async function* textOf(body, silenceMs) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let timer = 0;
  try {
    for (;;) {
      if (silenceMs) timer = setTimeout(() => reader.cancel().catch(() => {}), silenceMs);
      const { done, value } = await reader.read();
      clearTimeout(timer);
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    clearTimeout(timer);
    // Leaving early (a stop, an error) must close the connection: that is what tells the server to abort.
    reader.cancel().catch(() => {});
  }
}

/** The server lets a stream of events be silent for 15 s at most. */
const SILENCE_MS = 45000;

export class Api {
  /** In memory only: a reload forgets it. */
  #key = "";

  set key(value) {
    this.#key = value.trim();
  }

  get hasKey() {
    return this.#key !== "";
  }

  async #fetch(path, init = {}) {
    const headers = new Headers(init.headers);
    if (this.#key) headers.set("authorization", `Bearer ${this.#key}`);
    let response;
    try {
      response = await fetch(path, { ...init, headers, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError({ message: "The server did not answer.", code: "connection_failed" });
    }
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      throw errorFromBody(body, {
        status: response.status,
        requestId: response.headers.get("x-request-id") ?? "",
        retryAfter: response.headers.get("retry-after") ?? "",
      });
    }
    return response;
  }

  /** The whole body of an answer; a connection that breaks within it is an ApiError too. */
  async #body(path, init, read) {
    const response = await this.#fetch(path, init);
    try {
      return await read(response);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError({ message: "The connection broke while the server answered.", code: "connection_lost" });
    }
  }

  async json(path, init) {
    return this.#body(path, init, (response) => response.json());
  }

  async text(path, init) {
    return this.#body(path, init, (response) => response.text());
  }

  /** POST a JSON body; the JSON answer. */
  async post(path, body, { headers = {}, signal } = {}) {
    return this.json(path, {
      method: "POST",
      headers: { ...headers, "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  }

  /** POST a multipart form; the JSON answer. The browser writes the content type with its boundary. */
  async upload(path, form, { signal } = {}) {
    return this.json(path, { method: "POST", body: form, signal });
  }

  /**
   * GET a stream of events and yield each as {id, event}, from behind the event `after` on, until the server says that
   * there are no more. Throws ApiError for a refusal, for an error event, and when the connection breaks before that.
   */
  async *events(path, { after = "", signal, onOpen = () => {} } = {}) {
    const response = await this.#fetch(path, { headers: after ? { "last-event-id": after } : {}, signal });
    onOpen();
    for await (const { id, document } of this.#documents(response, SILENCE_MS)) yield { id, event: document };
  }

  /**
   * POST a request and yield each chunk of its answer; the only one, where the request is not a stream.
   * Throws ApiError for a refusal, for an error event, and when the stream ends before the server said it is done.
   */
  async *stream(path, body, { signal, onRequestId }) {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    onRequestId(response.headers.get("x-request-id") ?? "");
    if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
      yield await response.json();
      return;
    }
    for await (const { document } of this.#documents(response)) yield document;
  }

  /**
   * POST a request of a task and yield its events as {event, document}; the last one is `finished`.
   * Throws ApiError for a refusal, for an error event, and when the connection breaks before the last event.
   */
  async *task(path, body, { signal }) {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    });
    for await (const { event, document } of this.#documents(response)) {
      yield { event, document };
      if (event === "finished") return;
    }
  }

  /** The JSON documents of a stream, each with its event and the id that it was sent under. */
  async *#documents(response, silenceMs = 0) {
    const requestId = response.headers.get("x-request-id") ?? "";
    try {
      for await (const { event, data, id } of readEvents(textOf(response.body, silenceMs))) {
        if (data === "[DONE]") return;
        const document = JSON.parse(data);
        if (document.error) throw errorFromBody(document, { status: response.status, requestId, retryAfter: "" });
        yield { id, event, document };
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new ApiError({ message: "The connection broke while the answer was streaming.", code: "connection_lost", requestId });
    }
    throw new ApiError({ message: "The stream ended before the answer was complete.", code: "stream_incomplete", requestId });
  }
}
