/** The arithmetic of a chart: round ticks, short numbers, and fewer points that draw the same line. */

/** `value` of [low, high] -> a place between `start` and `end`. */
export function scale(low, high, start, end) {
  const factor = (end - start) / (high - low);
  return (value) => start + (value - low) * factor;
}

/**
 * Round numbers that enclose a range, about `count` of them: steps of 1, 2 or 5 times a power of ten.
 *
 * ticks(0.13, 0.92) -> [0, 0.2, 0.4, 0.6, 0.8, 1]
 */
export function ticks(low, high, { count = 5, whole = false } = {}) {
  if (high - low <= Math.max(1e-30, 1e-9 * Math.max(Math.abs(low), Math.abs(high)))) {
    const pad = Math.abs(low) / 30 || 1;
    [low, high, count] = [low - pad, high + pad, 2];
  }
  const rough = (high - low) / Math.max(1, count - 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  let unit = [1, 2, 5, 10].map((base) => base * power).find((value) => value >= rough * (1 - 1e-9));
  if (whole) unit = Math.max(1, unit);
  const [first, last] = [Math.floor(low / unit + 1e-9), Math.ceil(high / unit - 1e-9)];
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * unit).toPrecision(12)));
}

/** A number as a tick or a read-out shows it: 0.0002 -> "2e-4", 12000 -> "12k", 1500000 -> "1.5M". */
export function short(value, digits = 4) {
  const size = Math.abs(value);
  for (const [limit, unit, letter] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]]) {
    if (size >= limit) return `${Number((value / unit).toPrecision(digits))}${letter}`;
  }
  if (size > 0 && size < 1e-3) return value.toExponential(Math.min(3, digits - 1)).replace(/\.?0*e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

/**
 * The points that a line needs: of each pixel column the first, the least, the greatest and the last, in their order.
 * The line looks as if all were drawn (Jugel et al. 2014, "M4"): peaks stay, nothing is averaged.
 */
export function drawn(points) {
  const kept = [];
  for (let start = 0; start < points.length; ) {
    const column = Math.floor(points[start][0]);
    let end = start;
    let [low, high] = [start, start];
    while (end < points.length && Math.floor(points[end][0]) === column) {
      if (points[end][1] < points[low][1]) low = end;
      if (points[end][1] > points[high][1]) high = end;
      end += 1;
    }
    const indices = [...new Set([start, low, high, end - 1])].sort((a, b) => a - b);
    for (const index of indices) kept.push(points[index]);
    start = end;
  }
  return kept;
}

/** Where `value` stands in an ascending array, or would: the first index whose element is not below it. */
export function rankOf(sorted, value) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}
