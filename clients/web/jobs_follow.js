/**
 * Follow the events of a job until its last one, over every cut: what was read is remembered, and the next connection
 * goes on behind it (`Last-Event-ID`), so each event comes once.
 */

import { ApiError } from "./api.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15000;

/** Refusals that waiting does not mend. */
const LASTING = new Set([400, 401, 403, 404]);

/** Wait; false where the signal came first. */
export function pause(ms, signal) {
  return new Promise((resolve) => {
    const end = (whole) => {
      clearTimeout(timer);
      signal.removeEventListener("abort", stop);
      resolve(whole);
    };
    const stop = () => end(false);
    const timer = setTimeout(() => end(true), ms);
    signal.addEventListener("abort", stop);
    if (signal.aborted) stop();
  });
}

/**
 * `onEvent` gets each event. `onState` gets "live", "over", or an ApiError with `again`: whether the page goes on trying.
 * Returns when the events are over, the signal came, or the server refuses for good.
 */
export async function follow(api, jobId, { signal, onEvent, onState }) {
  let seen = 0;
  let wait = FIRST_PAUSE_MS;
  for (;;) {
    try {
      const path = `/v1/fine_tuning/jobs/${encodeURIComponent(jobId)}/events?stream=true`;
      for await (const { id, event } of api.events(path, { after: seen ? String(seen) : "", signal, onOpen: () => onState("live") })) {
        wait = FIRST_PAUSE_MS;
        if (Number(id) <= seen) continue;
        seen = Number(id);
        onEvent(event);
      }
      onState("over");
      return;
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      const again = !LASTING.has(error.status);
      onState(Object.assign(error, { again }));
      if (!again) return;
      const asked = Number(error.retryAfter) * 1000;
      if (!(await pause(asked > 0 ? asked : wait, signal))) return;
      wait = Math.min(LONGEST_PAUSE_MS, 2 * wait);
    }
  }
}
