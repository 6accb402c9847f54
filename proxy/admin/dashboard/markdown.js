// The Markdown that the manual is written in, as elements: headings, paragraphs, lists, tables, code, links, emphasis.
// What it does not know stays text. `link(target)` gives an address, or null for what is not to be followed.

import { el } from "./dom.js";
import { table } from "./table.js";

export function rendered(source, link) {
  const rows = source.replace(/<!--[\s\S]*?-->\n?/g, "").split("\n");
  const out = [];
  let i = 0;
  const span = (text) => inline(text, link);
  while (i < rows.length) {
    const row = rows[i];
    const fence = /^(`{3,}|~{3,})/.exec(row);
    const heading = /^(#{1,6}) +(.*)$/.exec(row);
    if (fence) {
      const body = [];
      for (i += 1; i < rows.length && !rows[i].startsWith(fence[1]); i += 1) body.push(rows[i]);
      out.push(el("pre", { tabindex: "0" }, el("code", {}, body.join("\n"))));
      i += 1;
    } else if (heading) {
      const depth = Math.min(heading[1].length + 1, 6);
      out.push(el(`h${depth}`, { id: `part-${slug(heading[2])}` }, span(heading[2])));
      i += 1;
    } else if (row.startsWith("|")) {
      const body = [];
      for (; i < rows.length && rows[i].startsWith("|"); i += 1) body.push(cells(rows[i]));
      const [head, , ...rest] = body;
      out.push(table(head.join(", "), head.map((label, column) =>
        ({ label: span(label), cell: (one) => span(one[column] ?? "") })), rest));
    } else if (/^ *([-*]|\d+\.) /.test(row)) {
      const [list, next] = listing(rows, i, span);
      out.push(list);
      i = next;
    } else if (row.startsWith(">")) {
      const body = [];
      for (; i < rows.length && rows[i].startsWith(">"); i += 1) body.push(rows[i].replace(/^> ?/, ""));
      out.push(el("blockquote", {}, rendered(body.join("\n"), link)));
    } else if (row.trim() === "") {
      i += 1;
    } else {
      const body = [row];
      for (i += 1; i < rows.length && rows[i].trim() && !/^(#{1,6} |\||`{3}|~{3}|>| *([-*]|\d+\.) )/.test(rows[i]); i += 1) body.push(rows[i]);
      out.push(el("p", {}, span(body.join(" "))));
    }
  }
  return out;
}

// A list and where it ends. What is indented belongs to the item above it.
function listing(rows, start, span) {
  const indent = /^ */.exec(rows[start])[0].length;
  const isOrdered = /^ *\d+\./.test(rows[start]);
  const items = [];
  let i = start;
  while (i < rows.length) {
    const item = /^( *)([-*]|\d+\.) +(.*)$/.exec(rows[i]);
    const depth = item ? item[1].length : /^ */.exec(rows[i])[0].length;
    if (item && depth === indent) {
      items.push({ text: item[3], inner: [] });
      i += 1;
    } else if (item && depth > indent) {
      const [list, next] = listing(rows, i, span);
      items.at(-1).inner.push(list);
      i = next;
    } else if (rows[i].trim() && depth > indent && items.length) {
      items.at(-1).text += ` ${rows[i].trim()}`;
      i += 1;
    } else break;
  }
  return [el(isOrdered ? "ol" : "ul", {}, items.map((item) => el("li", {}, span(item.text), item.inner))), i];
}

// A row's cells; a bar inside code, or behind a backslash, is text.
function cells(row) {
  const found = [""];
  let isCode = false;
  for (let i = 1; i < row.length; i += 1) {
    if (row[i] === "\\" && row[i + 1] === "|") { found[found.length - 1] += "|"; i += 1; }
    else if (row[i] === "|" && !isCode) found.push("");
    else { if (row[i] === "`") isCode = !isCode; found[found.length - 1] += row[i]; }
  }
  if (row.trimEnd().endsWith("|")) found.pop();
  return found.map((cell) => cell.trim());
}

const SPAN = /(`+)(.+?)\1|!\[([^\]]*)\]\([^)]*\)|\[((?:[^\[\]]|`[^`]*`)+)\]\(([^)\s]+)\)|\*\*(.+?)\*\*|(?<![\w*])\*([^*\s][^*]*)\*(?!\w)/g;

function inline(text, link) {
  const out = [];
  let last = 0;
  for (const found of text.matchAll(SPAN)) {
    out.push(text.slice(last, found.index));
    const [whole, , code, picture, label, target, strong, soft] = found;
    if (code !== undefined) out.push(el("code", {}, code.trim()));
    else if (picture !== undefined) out.push(el("span", { class: "quiet" }, picture ? `[${picture}]` : ""));
    else if (label !== undefined) {
      const address = link(target);
      out.push(address === null ? inline(label, link)
        : el("a", { href: address, ...(address.startsWith("#") ? {} : { rel: "noreferrer", target: "_blank" }) }, inline(label, link)));
    } else if (strong !== undefined) out.push(el("strong", {}, inline(strong, link)));
    else if (soft !== undefined) out.push(el("em", {}, inline(soft, link)));
    else out.push(whole);
    last = found.index + whole.length;
  }
  out.push(text.slice(last));
  return out;
}

// As the web forges make a heading's anchor.
const slug = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}\s_-]/gu, "").trim().replace(/\s/g, "-");
