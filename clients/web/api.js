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
 * Yields {event, data}.
 */
export async function* readEvents(chunks) {
  let buffer = "";
  let event = "";
  let data = [];
  for await (const chunk of chunks) {
    buffer += chunk;
    const lines = buffer.split(/\r\n|\n/);
    buffer = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield { event: event || "message", data: data.join("\n") };
        event = "";
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      } else if (line.startsWith("event:")) {
        event = line.slice(6).trim();
      }
    }
  }
}

async function* textOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    // Leaving early (a stop, an error) must close the connection: that is what tells the server to abort.
    reader.cancel().catch(() => {});
  }
}

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

  async json(path, init) {
    return (await this.#fetch(path, init)).json();
  }

  async text(path, init) {
    return (await this.#fetch(path, init)).text();
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
    const requestId = response.headers.get("x-request-id") ?? "";
    onRequestId(requestId);
    if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
      yield await response.json();
      return;
    }
    try {
      for await (const { data } of readEvents(textOf(response.body))) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw errorFromBody(chunk, { status: response.status, requestId, retryAfter: "" });
        yield chunk;
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new ApiError({ message: "The connection broke while the answer was streaming.", code: "connection_lost", requestId });
    }
    throw new ApiError({ message: "The stream ended before the answer was complete.", code: "stream_incomplete", requestId });
  }
}
