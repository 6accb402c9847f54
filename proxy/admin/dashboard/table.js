// Tables that a screen reader can walk: a caption, scoped headers, and one cell that names the row.

import { el } from "./dom.js";

// columns: {label, cell: row => text or node, number?: true, wide?: true, whole?: true (one line), kind?: a class, head?: true}. The first names the row
// unless another one does.
export function table(caption, columns, rows, { empty = "Nothing here yet.", hidden = false, rowClass = null } = {}) {
  if (!rows.length && !hidden) return el("p", { class: "empty" }, empty);
  const naming = Math.max(columns.findIndex((column) => column.head), 0);
  const cell = (row, column, i) => {
    const about = { class: [column.number && "number", column.wide && "wide", column.whole && "whole", column.kind].filter(Boolean).join(" ") || null };
    const inside = column.cell(row) ?? "–";
    return i === naming ? el("th", { scope: "row", ...about }, inside) : el("td", about, inside);
  };
  const body = el("tbody", {}, rows.map((row) =>
    el("tr", { class: rowClass?.(row) }, columns.map((column, i) => cell(row, column, i)))));
  const head = el("tr", {}, columns.map((column) =>
    el("th", { scope: "col", class: column.number ? "number" : null }, column.label)));
  return el("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    el("table", {}, el("caption", { class: "unseen" }, caption), el("thead", {}, head), body));
}

// Name and value, one a line.
export const facts = (pairs) =>
  el("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
