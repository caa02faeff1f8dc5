// Small helpers: elements, numbers and times as text, and the colours of versions.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") Object.assign(element.style, value); // CSSOM: allowed by the policy
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Make an HTML element; text is always text, never markup. */
export const h = (tag, attributes, ...children) =>
  build(document.createElement(tag), attributes, children);

/** Make an SVG element. */
export const s = (tag, attributes, ...children) =>
  build(document.createElementNS(SVG, tag), attributes, children);

export const byId = (id) => document.getElementById(id);

const whole = new Intl.NumberFormat("en");

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (isNumber(value) ? whole.format(Math.round(value)) : "–");

/** A share as a percentage, which holds together with its sign. */
export const percent = (share, digits = 1) =>
  isNumber(share) ? `${(100 * share).toFixed(share === 1 ? 0 : digits)}\u00a0%` : "–";

/** A number with about three digits that count. */
export function short(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  if (size >= 1000) return whole.format(Math.round(value));
  return String(Number(value.toPrecision(3)));
}

export const ms = (value) => (isNumber(value) ? `${short(value)}\u00a0ms` : "–");

/** Seconds since 1970 from ISO 8601 or a number in seconds, milliseconds or microseconds. */
export function seconds(time) {
  if (typeof time === "string") {
    const parsed = Date.parse(time);
    return Number.isNaN(parsed) ? null : parsed / 1000;
  }
  if (!isNumber(time)) return null;
  if (time > 1e14) return time / 1e6;
  return time > 1e11 ? time / 1e3 : time;
}

export const clock = (time) =>
  new Date(1000 * time).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });

/** How long ago, in words. */
export function ago(time) {
  const at = seconds(time);
  if (at === null) return "";
  const passed = Math.max(0, Date.now() / 1000 - at);
  if (passed < 60) return "just now";
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  const days = Math.floor(passed / 86400);
  return `${days} ${days === 1 ? "day" : "days"} ago`;
}

const NUM_COLOURS = 6;

/** The class that carries a version's colour, the same in every part of the page. */
export const colourOf = (version) => `v${Number(version) % NUM_COLOURS}`;

/** Run a drawing function only if what it draws has changed, so that focus and scroll stay. */
export function onChange(draw) {
  let last;
  return (...values) => {
    const now = JSON.stringify(values);
    if (now === last) return;
    last = now;
    draw(...values);
  };
}
