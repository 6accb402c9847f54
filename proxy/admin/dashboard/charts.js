// Charts as SVG, drawn at the width there is and coloured by the stylesheet; each carries its numbers as a table.

import { el, set, svg } from "./dom.js";
import { table } from "./table.js";

const HEIGHT = 220;
const PAD = { top: 10, right: 12, bottom: 24, left: 64 };

// Round numbers from at or below `low` to at or above `high`, about `wanted` of them.
export function ticks(low, high, wanted = 4) {
  if (!(high > low)) return [low];
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw) ?? 10 * power;
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

// A figure: heading, drawing, legend, readout under the pointer, and the table. `draw(width)` returns {node, at}, where
// `at(x)` is the index of the column under x.
function figure(title, about, draw, { series, labels, format, head }) {
  const stage = el("div", { class: "stage", role: "img", "aria-label": about });
  const readout = el("p", { class: "readout", "aria-hidden": "true" }, "\u00a0");
  let drawn = null;
  const redraw = () => {
    const width = Math.max(stage.clientWidth, 240);
    drawn = draw(width);
    set(stage, drawn.node);
  };
  stage.addEventListener("pointermove", (event) => {
    const i = drawn?.at(event.clientX - stage.getBoundingClientRect().left);
    if (i === undefined || i === null || i < 0 || i >= labels.length) return;
    const told = series.filter((one) => one.values[i]).map((one) => `${one.name} ${format(one.values[i])}`);
    readout.textContent = `${labels[i]}: ${told.join(" · ") || format(0)}`;
  });
  stage.addEventListener("pointerleave", () => { readout.textContent = "\u00a0"; });
  new ResizeObserver(redraw).observe(stage);
  const legend = series.length > 1 && el("ul", { class: "legend", "aria-hidden": "true" }, series.map((one) =>
    el("li", {}, svg("svg", { width: 10, height: 10, class: one.tone }, svg("rect", { width: 10, height: 10, rx: 2 })),
      one.name)));
  const columns = [{ label: head, cell: (row) => labels[row] },
    ...series.map((one) => ({ label: one.name, number: true, cell: (row) => format(one.values[row]) }))];
  return el("figure", {},
    el("figcaption", {}, el("h2", {}, title), legend),
    stage, readout,
    el("details", {}, el("summary", {}, "As a table"), table(title, columns, labels.map((_, i) => i))));
}

function axes(width, scale, marks, labels, place, format) {
  const right = width - PAD.right;
  const every = Math.max(Math.ceil(labels.length / Math.max(Math.floor((width - PAD.left) / 84), 1)), 1);
  return [
    marks.map((mark) => svg("g", { class: mark === 0 ? "zero" : "grid" },
      svg("line", { x1: PAD.left, x2: right, y1: scale(mark), y2: scale(mark) }),
      svg("text", { x: PAD.left - 8, y: scale(mark) + 4, "text-anchor": "end" }, format(mark)))),
    labels.map((label, i) => i % every === 0 && svg("text", {
      x: place(i), y: HEIGHT - 6, "text-anchor": i === 0 && labels.length > 1 ? "start" : "middle", class: "label",
    }, label)),
  ];
}

const canvas = (width, ...children) =>
  svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" }, ...children);

// Stacked bars, one a label; what is negative hangs below zero. series: {name, tone, values}; `mark` spells the axis.
export function bars(title, about, labels, series, { format, mark = format, head = "Day" }) {
  const totals = labels.map((_, i) => series.reduce((sum, one) => {
    const value = one.values[i] ?? 0;
    return value < 0 ? [sum[0] + value, sum[1]] : [sum[0], sum[1] + value];
  }, [0, 0]));
  const marks = ticks(Math.min(0, ...totals.map((t) => t[0])), Math.max(0, ...totals.map((t) => t[1])) || 1);
  const [low, high] = [marks[0], marks.at(-1)];
  const scale = (value) => PAD.top + ((high - value) / (high - low)) * (HEIGHT - PAD.top - PAD.bottom);
  const draw = (width) => {
    const slot = (width - PAD.left - PAD.right) / labels.length;
    const thick = Math.min(Math.max(slot * 0.72, 1), 42);
    const place = (i) => PAD.left + slot * (i + 0.5);
    const rects = labels.map((_, i) => {
      let [down, up] = [0, 0];
      return series.map((one) => {
        const value = one.values[i] ?? 0;
        if (!value) return null;
        const from = value < 0 ? down : up;
        if (value < 0) down += value; else up += value;
        const [top, bottom] = [scale(Math.max(from, from + value)), scale(Math.min(from, from + value))];
        return svg("rect", { class: one.tone, x: place(i) - thick / 2, y: top, width: thick,
          height: Math.max(bottom - top, 0.75) });
      });
    });
    return { node: canvas(width, axes(width, scale, marks, labels, place, mark), rects),
      at: (x) => Math.floor((x - PAD.left) / slot) };
  };
  return figure(title, about, draw, { series, labels, format, head });
}

// Lines over labels; a null is a gap. `at`: the label that is marked by a line of its own.
export function lines(title, about, labels, series, { format, head = "Day", top = null, at = null }) {
  const values = series.flatMap((one) => one.values).filter((value) => value !== null && value !== undefined);
  const marks = ticks(0, top ?? (Math.max(...values, 0) || 1));
  const high = marks.at(-1);
  const scale = (value) => PAD.top + ((high - value) / high) * (HEIGHT - PAD.top - PAD.bottom);
  const draw = (width) => {
    const slot = (width - PAD.left - PAD.right) / labels.length;
    const place = (i) => PAD.left + slot * (i + 0.5);
    const drawn = series.map((one) => {
      let path = "";
      let isPen = false;
      const dots = [];
      one.values.forEach((value, i) => {
        if (value === null || value === undefined) { isPen = false; return; }
        path += `${isPen ? "L" : "M"}${place(i).toFixed(1)} ${scale(value).toFixed(1)}`;
        isPen = true;
        if (labels.length <= 40) dots.push(svg("circle", { cx: place(i), cy: scale(value), r: 2.5 }));
      });
      return svg("g", { class: `line ${one.tone}` }, svg("path", { d: path }), dots);
    });
    const here = at !== null && svg("line", { class: "here", x1: place(at), x2: place(at), y1: PAD.top,
      y2: HEIGHT - PAD.bottom });
    return { node: canvas(width, axes(width, scale, marks, labels, place, format), here, drawn),
      at: (x) => Math.floor((x - PAD.left) / slot) };
  };
  return figure(title, about, draw, { series, labels, format, head });
}

// A span from `low` to `high` with a dot at `value`, on a logarithmic scale from 0.1 ms to two minutes.
export function spread(value, high) {
  const place = (v) => (Math.log10(Math.max(v, 0.1)) + 1) / (Math.log10(120_000) + 1) * 96 + 2;
  return svg("svg", { class: "spread", width: 100, height: 14, viewBox: "0 0 100 14", "aria-hidden": "true" },
    svg("line", { x1: 2, x2: 98, y1: 7, y2: 7, class: "track" }),
    svg("line", { x1: place(value), x2: Math.max(place(high), place(value) + 1), y1: 7, y2: 7, class: "reach" }),
    svg("circle", { cx: place(value), cy: 7, r: 4 }));
}

// The measured share, its interval and the budget on one line, from 0 to a little beyond the largest of them.
export function gauge(value, [low, high], budget) {
  const most = Math.max(budget * 2, Math.min(high, budget * 6), value ?? 0) * 1.05;
  const place = (v) => Math.min(v / most, 1) * 236 + 2;
  return svg("svg", { class: "gauge", viewBox: "0 0 240 30", "aria-hidden": "true" },
    svg("line", { x1: 2, x2: 238, y1: 15, y2: 15, class: "track" }),
    svg("line", { x1: place(low), x2: place(high), y1: 15, y2: 15, class: high <= budget ? "reach" : "reach beyond" }),
    value !== null && svg("circle", { cx: place(value), cy: 15, r: 5 }),
    svg("line", { x1: place(budget), x2: place(budget), y1: 3, y2: 27, class: "budget" }));
}
