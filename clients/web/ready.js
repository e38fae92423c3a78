/** Whether the server is ready, in the header. */

import { byId } from "./dom.js";

/** Ask once and show it. */
export async function showReadiness(api) {
  let [state, text] = ["up", "ready"];
  try {
    await api.json("/readyz");
  } catch (error) {
    [state, text] = error.status === 503 ? ["wait", error.message] : ["down", "unreachable"];
  }
  byId("ready").dataset.state = state;
  // A status region speaks when its text changes, so it is only touched then.
  if (byId("ready-text").textContent !== text) byId("ready-text").textContent = text;
}
