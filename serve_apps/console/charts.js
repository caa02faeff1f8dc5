// Line charts in SVG: time to the right, one colour a version, a readout under the pointer.

import { clock, h, s } from "./dom.js";

const HEIGHT = 190;
const LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 24;

/**
 * A card with a chart. A line is {label, colour, values, low?, high?, isDashed?, marks?}: values per
 * time or null, a band between low and high, and marks, the indices of points to stress.
 */
export class Chart {
  constructor(card, { title, unit, empty, format, top }) {
    this.options = { title, unit, empty, format, top };
    this.times = [];
    this.lines = [];
    this.note = h("p", { class: "muted" }, unit);
    this.legend = h("ul", { class: "legend" });
    this.plot = h("div", { class: "plot" });
    card.replaceChildren(
      h("div", { class: "head" }, h("h2", {}, title), this.note),
      this.plot,
      this.legend,
    );
    this.plot.onpointermove = (event) => this.#read(event);
    this.plot.onpointerleave = () => this.#showValues(null);
    new ResizeObserver(() => this.#draw()).observe(this.plot);
  }

  /** Draw; `times` are seconds since 1970. */
  update(times, lines, note = null) {
    this.times = times;
    this.lines = lines.filter((line) => line.values.some((value) => value !== null));
    this.note.textContent = note ?? this.options.unit;
    this.#draw();
  }

  #draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    if (!this.lines.length || this.times.length < 2) {
      this.plot.replaceChildren(h("p", { class: "empty" }, this.options.empty));
      this.legend.replaceChildren();
      return;
    }
    const [low, high] = this.#range();
    const first = this.times[0], last = this.times.at(-1);
    this.x = (time) => LEFT + ((time - first) / (last - first || 1)) * (width - LEFT - RIGHT);
    const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    this.cursor = s("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    const drawing = s(
      "svg",
      { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": this.#words() },
      this.#yAxis(low, high, y, width),
      this.#xAxis(first, last, width),
      this.lines.map((line) => this.#line(line, y)),
      this.cursor,
    );
    this.plot.replaceChildren(drawing);
    this.#showValues(null);
  }

  #range() {
    const numbers = this.lines
      .flatMap(({ values, low, high }) => [...values, ...(low ?? []), ...(high ?? [])])
      .filter((value) => value !== null);
    const most = Math.max(...numbers), least = Math.min(...numbers);
    if (this.options.top === undefined) return [0, most > 0 ? niceUp(most) : 1];
    // A share near 100 %: from below the worst value up to the top.
    const room = Math.max(this.options.top - least, 0.02);
    return [Math.max(0, this.options.top - niceUp(room)), this.options.top];
  }

  #yAxis(low, high, y, width) {
    return [0, 1, 2, 3, 4].map((part) => {
      const value = low + ((high - low) * part) / 4;
      const at = y(value);
      return s(
        "g",
        {},
        s("line", { class: part ? "grid" : "base", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }),
        s("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, this.options.format(value)),
      );
    });
  }

  #xAxis(first, last, width) {
    const parts = width > 420 ? 4 : 2;
    return Array.from({ length: parts + 1 }, (_, part) => {
      const time = first + ((last - first) * part) / parts;
      const anchor = { 0: "start", [parts]: "end" }[part] ?? "middle";
      const text = last - first > 2 * 86400 ? day(time) : clock(time);
      return s("text", { x: this.x(time), y: HEIGHT - 6, "text-anchor": anchor }, text);
    });
  }

  #line({ values, low, high, colour, isDashed, marks }, y) {
    const at = (list) =>
      list.map((value, index) => (value === null ? null : [this.x(this.times[index]), y(value)]));
    const points = at(values);
    const lone = points.filter((point, index) => point && !points[index - 1] && !points[index + 1]);
    return s(
      "g",
      { class: colour },
      low ? s("path", { class: "band", d: band(at(low), at(high)) }) : null,
      s("path", { class: isDashed ? "line dashed" : "line", d: path(points) }),
      lone.map(([cx, cy]) => s("circle", { class: "point", cx, cy, r: 2.5 })),
      (marks ?? [])
        .filter((index) => points[index])
        .map((index) => points[index])
        .map(([cx, cy]) => s("circle", { class: "mark", cx, cy, r: 4.5 })),
    );
  }

  #read(event) {
    if (!this.lines.length || !this.x) return;
    const left = event.clientX - this.plot.getBoundingClientRect().left;
    let best = 0;
    this.times.forEach((time, index) => {
      if (Math.abs(this.x(time) - left) < Math.abs(this.x(this.times[best]) - left)) best = index;
    });
    this.#showValues(best);
  }

  /** Put the values at a time into the legend, the newest ones for null. */
  #showValues(index) {
    if (!this.cursor) return;
    this.cursor.setAttribute("visibility", index === null ? "hidden" : "visible");
    if (index !== null) {
      for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, this.x(this.times[index]));
    }
    const items = this.lines.map((line) => {
      const value = index === null ? newest(line.values) : line.values[index];
      const text = value === null ? "–" : this.options.format(value);
      const key = h("span", { class: line.isDashed ? "key dashed" : "key", "aria-hidden": "true" });
      return h("li", { class: line.colour }, key, `${line.label} `, h("strong", {}, text));
    });
    const when = index === null ? "now" : clock(this.times[index]);
    this.legend.replaceChildren(...items, h("li", { class: "when" }, when));
  }

  #words() {
    const { format } = this.options;
    const values = this.lines.map((line) => `${line.label} ${format(newest(line.values))}`);
    return `${this.options.title}, ${this.options.unit}. Newest: ${values.join(", ")}.`;
  }
}

const newest = (values) => values.findLast((value) => value !== null) ?? null;

const day = (time) =>
  new Date(1000 * time).toLocaleDateString("en-GB", { day: "numeric", month: "short" });

function path(points) {
  let text = "", isOpen = false;
  for (const point of points) {
    if (point) text += `${isOpen ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
    isOpen = Boolean(point);
  }
  return text;
}

function band(low, high) {
  const both = low.map((point, index) => [point, high[index]]).filter(([a, b]) => a && b);
  if (both.length < 2) return "";
  const there = both.map(([, point]) => point), back = both.map(([point]) => point).reverse();
  return `${path([...there, ...back])}Z`;
}

/** The next number that divides well by four. */
function niceUp(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].find((step) => step * size >= value * 0.9999) * size;
}
