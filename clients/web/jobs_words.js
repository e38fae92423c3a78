/** How numbers, times and states of jobs are said. */

export const FINAL = new Set(["succeeded", "failed", "cancelled"]);

/** What a person may ask of a job in each state; the server decides, this only dims the buttons. */
export const ALLOWED = {
  pause: new Set(["validating", "queued", "preparing", "starting", "running", "exporting", "verifying"]),
  resume: new Set(["paused", "pausing"]),
  cancel: new Set(["validating", "queued", "preparing", "starting", "running", "pausing", "paused", "exporting", "verifying"]),
  deploy: new Set(["succeeded"]),
};

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** 75 -> "1 min 15 s", 3700 -> "1 h 2 min". */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

/** 1500000 -> "1.4 MiB". */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let [value, unit] = [number, 0];
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit ? value.toFixed(value < 10 ? 1 : 0) : value} ${units[unit]}`;
}

/** Unix seconds in this browser's clock. */
export const clock = (unix) => new Date(unix * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
export const clockMs = (unix) => new Date(unix).toLocaleTimeString("en-GB");

/** How far a job is, as a share, or null where it does not move. */
export function share({ trilithon }) {
  const { state, progress } = trilithon;
  if (state === "preparing") return progress.prepare_fraction;
  if (state === "succeeded") return 1;
  return progress.total_steps ? progress.step / progress.total_steps : 0;
}

/** The same in words: steps, and what the server says is left. */
export function standing({ trilithon }) {
  const { state, progress, queue_position: position } = trilithon;
  if (state === "validating") return "checks configuration and data";
  if (state === "queued") return position ? `number ${position} in the queue` : "waits for a worker";
  if (state === "preparing") return `prepares the data, ${Math.floor(100 * progress.prepare_fraction)} %`;
  if (state === "starting") return "loads the model";
  const words = progress.total_steps ? [`step ${progress.step.toLocaleString("en")} of ${progress.total_steps.toLocaleString("en")}`] : [];
  if (state === "running") words.push(progress.seconds_remaining === null ? "time left not known yet" : `${duration(progress.seconds_remaining)} left`);
  return words.join(", ");
}

/** A tree as ["a.b", value] pairs; lists and empty objects are values. */
export function flat(tree, path = []) {
  return Object.entries(tree).flatMap(([name, value]) => {
    const nested = value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length;
    return nested ? flat(value, [...path, name]) : [[[...path, name].join("."), value]];
  });
}
