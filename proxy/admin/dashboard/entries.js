// What is stored: found, looked at, given another life or other tags, and removed after a look at what would go.

import { at, get, patch, post, remove } from "./api.js";
import { button, confirmed, el, field, put, say, set } from "./dom.js";
import { ago, bytes, count, ms, plural, until, when, words } from "./format.js";
import { facts, table } from "./table.js";

export const title = "Entries";

const PAGE = 25;
const FILTERS = [["q", "Question contains"], ["tag", "Tag"], ["namespace", "Namespace"], ["model", "Model"]];

export const show = (place, rest, query, signal) =>
  (rest[0] ? showOne(place, rest[0], signal) : showList(place, query, signal));

const tags = (names) => names.map((name) => el("span", { class: "tag" }, name));
const lives = (entry) => (entry.quarantined ? el("span", { class: "badge bad" }, "out of service")
  : entry.expires_ms < Date.now() ? el("span", { class: "badge warn" }, `stale since ${ago(entry.expires_ms)}`)
    : until(entry.expires_ms));

const COLUMNS = [
  { label: "Question", wide: true, cell: (entry) =>
    el("a", { href: `#/entries/${entry.id}`, class: "clip" }, entry.prompt || `entry ${entry.id}, not text`) },
  { label: "Model", whole: true, cell: (entry) => entry.model },
  { label: "Namespace", cell: (entry) => entry.namespace || "–" },
  { label: "Tags", kind: "tags", cell: (entry) => (entry.tags.length ? tags(entry.tags) : "–") },
  { label: "Stored", whole: true, cell: (entry) => ago(entry.created_ms) },
  { label: "Last used", whole: true, cell: (entry) => (entry.used_ms > entry.created_ms ? ago(entry.used_ms) : "never") },
  { label: "Ends", whole: true, cell: lives },
  { label: "Size", number: true, cell: (entry) => bytes(entry.answer_bytes) },
];

async function showList(place, query, signal) {
  const fields = FILTERS.map(([name, label]) => [name, ...field(label, { type: "search", spellcheck: "false" })]);
  for (const [name, , input] of fields) input.value = query.get(name) ?? "";
  const filters = () => Object.fromEntries(fields.map(([name, , input]) => [name, input.value.trim()]));
  const form = el("form", { class: "row", role: "search", "aria-label": "Search entries", onsubmit: (event) => {
    event.preventDefault();
    location.hash = at("#/entries", filters());
  } }, fields.map(([, labelled]) => labelled), el("button", { class: "primary" }, "Search"));
  const told = el("p", { class: "quiet" });
  const list = el("div", {});
  const more = el("div", { class: "row" });
  put(place, form, await purging(signal), told, list, more);
  let rows = [];
  let cursor = null;
  const load = async () => {
    const page = await get(at("/cache/entries", { ...filters(), limit: PAGE, cursor }), signal);
    rows = [...rows, ...page.entries];
    cursor = page.next_cursor;
    told.textContent = `${plural(rows.length, "entry", "entries")}${cursor ? ", and more" : ""}`;
    set(list, table("Entries, newest first", COLUMNS, rows, { empty: "No such entry." }));
    set(more, ...(cursor ? [button("Older", load)] : []));
    say(told.textContent);
  };
  await load();
}

const LABELS = { tags: "Tags, with commas", namespace: "Namespace", model: "Model", older_than: "Asked before (30d, 2026-11-22)",
  writer: "Request id or tenant that caused them", similar_to: "About, by meaning", ids: "Entry ids, with commas" };

// The form is made from what this ibid's own description says a purge takes.
async function purging(signal) {
  const described = await get("/openapi.json", signal);
  const { properties } = described.paths["/cache/invalidate"].post.requestBody.content["application/json"].schema;
  const fields = Object.entries(properties).filter(([name]) => name !== "dry_run").map(([name, schema]) =>
    [name, schema, ...field(LABELS[name] ?? words(name), { title: schema.description, spellcheck: "false" })]);
  const answer = el("div", { "aria-live": "polite" });
  const wanted = () => Object.fromEntries(fields.map(([name, schema, , input]) => [name, read(input.value.trim(), schema)])
    .filter(([, value]) => value !== null));
  const look = async (event) => {
    event.preventDefault();
    const selected = wanted();
    try {
      const found = await post("/cache/invalidate", { ...selected, dry_run: true });
      set(answer, ...foundBy(found, selected));
    } catch (error) {
      set(answer, el("p", { class: "trouble" }, error.message));
    }
  };
  const foundBy = (found, selected) => [
    el("p", {}, `${plural(found.count, "entry", "entries")} would go. `, found.ids.slice(0, 20).map((id, i) =>
      [i ? ", " : "", el("a", { href: `#/entries/${id}` }, String(id))]), found.count > 20 ? " …" : ""),
    found.count > 0 && button(`Purge ${plural(found.count, "entry", "entries")}`, async () => {
      const isSure = await confirmed("Purge these entries?", `${plural(found.count, "entry", "entries")} will be gone from `
        + "the database, the index and memory. This cannot be undone.", "Purge");
      if (!isSure) return;
      const gone = await post("/cache/invalidate", { ...selected, dry_run: false });
      set(answer, el("p", {}, `${plural(gone.count, "entry", "entries")} purged.`));
    }, { class: "danger" }),
  ].filter(Boolean);
  return el("details", { class: "card" }, el("summary", {}, "Purge"),
    el("p", { class: "quiet" }, "What meets every field given. First it is only shown."),
    el("form", { class: "row", "aria-label": "Purge", onsubmit: look }, fields.map(([, , labelled]) => labelled),
      el("button", {}, "Show what would go")), answer);
}

function read(text, schema) {
  if (!text) return null;
  if (schema.type === "array") return text.split(",").map((part) => part.trim()).filter(Boolean);
  if (schema.type === "number" || schema.type === "integer") return Number(text);
  return text;
}

async function showOne(place, id, signal) {
  const entry = await get(`/cache/entries/${encodeURIComponent(id)}`, signal);
  put(place, 
    el("p", {}, el("a", { href: "#/entries" }, "All entries"), " · ",
      el("a", { href: `#/requests?entry_id=${entry.id}` }, "Requests it answered")),
    el("section", { class: "card" }, el("h2", {}, "Question"), el("pre", { class: "text", tabindex: "0" }, entry.prompt || "(not text)"),
      el("h2", {}, "Answer"), el("pre", { class: "text", tabindex: "0" }, answerOf(entry.answer.message)),
      facts([
        ["Entry", String(entry.id)], ["Model", entry.model], ["Upstream", entry.upstream], ["Operation", entry.operation],
        ["Namespace", entry.namespace], ["Stored", `${when(entry.created_ms)}, ${ago(entry.created_ms)}`],
        ["Ends", until(entry.expires_ms)], ["Finish", entry.answer.finish_reason],
        ["Tokens in / out", entry.usage && `${count(entry.usage.input_tokens)} / ${count(entry.usage.output_tokens)}`],
        ["Took upstream", ms(entry.total_ms)],
        ["Stored by", el("a", { href: `#/requests/${encodeURIComponent(entry.request_id)}` }, entry.request_id)],
        ["Embedded by", entry.embedder], ["Tenant", el("span", { class: "mono" }, entry.tenant.slice(0, 16))],
      ])),
    editing(entry),
  );
}

export function answerOf(message) {
  if (typeof message.content === "string" && message.content) return message.content;
  return JSON.stringify(message, null, 2);
}

function editing(entry) {
  const [life, ttl] = field("Fresh for so many seconds from now", { type: "number", min: 1, inputmode: "numeric",
    placeholder: String(Math.max(Math.round((entry.expires_ms - Date.now()) / 1000), 0)) });
  const [labels, names] = field("Tags, with commas", { value: entry.tags.join(", "), spellcheck: "false" });
  const answer = el("p", { role: "status" });
  const save = async (event) => {
    event.preventDefault();
    const change = {};
    if (ttl.value) change.ttl_s = Number(ttl.value);
    const wanted = names.value.split(",").map((name) => name.trim()).filter(Boolean);
    if (wanted.join() !== entry.tags.join()) change.tags = wanted;
    try {
      const amended = await patch(`/cache/entries/${entry.id}`, change);
      entry.tags = amended.tags;
      ttl.value = "";
      answer.textContent = `Saved. It ends ${until(amended.expires_ms)}; tags: ${amended.tags.join(", ") || "none"}.`;
    } catch (error) {
      answer.textContent = error.message;
    }
  };
  return el("section", { class: "card" }, el("h2", {}, "Change"),
    el("form", { class: "row", "aria-label": "Change the entry", onsubmit: save }, life, labels, el("button", {}, "Save"),
      button("Purge this entry", async () => {
        if (!(await confirmed("Purge this entry?", "Its answer will not be served again. This cannot be undone.", "Purge"))) return;
        await remove(`/cache/entries/${entry.id}`);
        location.hash = "#/entries";
      }, { class: "danger" })), answer);
}
