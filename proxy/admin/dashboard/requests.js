// What was asked, answered and paid: the ledger row by row, as it grows, and one request with all that is known of it.

import { at, get } from "./api.js";
import { button, el, field, put, say, set, svg } from "./dom.js";
import { count, ms, nusd, plural, share, usd, when, words } from "./format.js";
import { facts, table } from "./table.js";

export const title = "Requests";

const STATES = ["HIT", "MISS", "BYPASS", "STALE", "REFRESH", "SHADOW", "AUDIT"];
const PAGE = 50;
const TAIL_MS = 2000;

export const show = (place, rest, query, signal) =>
  (rest[0] ? showOne(place, rest[0], signal) : showList(place, query, signal));

export const state = (row) => el("span", {
  class: `badge ${row.cache_status === "HIT" ? "hit" : row.outcome === "error" || row.status >= 500 ? "bad" : ""}` },
  row.outcome === "ok" ? row.cache_status.toLowerCase() : `${row.cache_status.toLowerCase()}, ${row.outcome}`);

const COLUMNS = [
  { label: "When", whole: true, cell: (row) => el("a", { href: `#/requests/${encodeURIComponent(row.id)}` }, when(row.ts)) },
  { label: "Cache", whole: true, cell: state },
  { label: "Lane", whole: true, cell: (row) => row.lane },
  { label: "Reason", whole: true, cell: (row) => words(row.reason) || "–" },
  { label: "Model", whole: true, cell: (row) => row.model_requested || "–" },
  { label: "Tokens in / out", number: true, cell: (row) => (row.in_tok === null ? "–" : `${count(row.in_tok)} / ${count(row.out_tok)}`) },
  { label: "Paid", number: true, cell: (row) => paid(row) },
  { label: "Saved", number: true, cell: (row) => (isUnpriced(row) ? "–" : nusd(row.baseline_nusd - row.actual_nusd)) },
  { label: "Took", number: true, cell: (row) => ms(row.total_ms) },
];

const isUnpriced = (row) => row.baseline_basis === "unpriced";
const paid = (row) => (isUnpriced(row) ? el("span", { class: "badge warn" }, "unpriced") : nusd(row.actual_nusd));

async function showList(place, query, signal) {
  const fields = [
    ["cache_status", ...field("Cache", {}, [["", "all"], ...STATES.map((name) => [name, name.toLowerCase()])])],
    ...[["model", "Model"], ["lane", "Lane"], ["reason", "Reason"], ["team", "Team"]].map(([name, label]) =>
      [name, ...field(label, { spellcheck: "false", autocapitalize: "none" })]),
    ["since", ...field("Since", { placeholder: "1h, 7d, 2026-11-22" })],
  ];
  for (const [name, , input] of fields) input.value = query.get(name) ?? "";
  const tail = el("input", { type: "checkbox", id: "tail" });
  const filters = () => ({ ...Object.fromEntries(fields.map(([name, , input]) => [name, input.value.trim()])),
    entry_id: query.get("entry_id") });
  const form = el("form", { class: "row", role: "search", "aria-label": "Filter requests", onsubmit: (event) => {
    event.preventDefault();
    location.hash = at("#/requests", filters());
  } }, fields.map(([, labelled]) => labelled), el("button", { class: "primary" }, "Filter"));
  const told = el("p", { class: "quiet" });
  const list = el("div", {});
  const more = el("div", { class: "row" });
  put(place, form,
    query.get("entry_id") && el("p", { class: "quiet" }, "Served, or nearly served, from ",
      el("a", { href: `#/entries/${query.get("entry_id")}` }, `entry ${query.get("entry_id")}`), "."),
    el("div", { class: "row between" }, told, el("label", { class: "tick", for: "tail" }, tail, "Live")), list, more);

  let rows = [];
  let cursor = null;
  const known = new Set();
  const fresh = new Set();
  const draw = () => {
    told.textContent = plural(rows.length, "request");
    set(list, table("Requests, newest first", COLUMNS, rows, { empty: "No such request.",
      rowClass: (row) => (fresh.has(row.id) ? "fresh" : null) }));
    set(more, ...(cursor ? [button("Older", older)] : []));
  };
  const ask = (extra = {}) => get(at("/requests", { ...filters(), limit: PAGE, ...extra }), signal);
  const older = async () => {
    const page = await ask({ cursor });
    rows = [...rows, ...page.requests];
    page.requests.forEach((row) => known.add(row.id));
    cursor = page.next_cursor;
    draw();
    say(`${plural(page.requests.length, "older request")} added`);
  };
  const newer = async () => {
    const found = (await ask()).requests.filter((row) => !known.has(row.id));
    fresh.clear();
    if (!found.length) return;
    found.forEach((row) => { known.add(row.id); fresh.add(row.id); });
    rows = [...found, ...rows].slice(0, 500);
    draw();
    say(`${plural(found.length, "new request")}`);
  };
  const first = await ask();
  rows = first.requests;
  rows.forEach((row) => known.add(row.id));
  cursor = first.next_cursor;
  draw();
  let isAsking = false;
  const timer = setInterval(async () => {
    if (!tail.checked || isAsking || document.hidden) return;
    isAsking = true;
    await newer().catch((error) => { tail.checked = signal.aborted; told.textContent = error.message; });
    isAsking = false;
  }, TAIL_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
}

async function showOne(place, id, signal) {
  const row = await get(`/requests/${encodeURIComponent(id)}`, signal);
  put(place, 
    el("p", {}, el("a", { href: "#/requests" }, "All requests")),
    el("section", { class: "card" },
      el("div", { class: "row between" }, el("h2", { class: "mono" }, row.id), state(row)),
      row.story.map((line) => el("p", {}, line)),
      facts([
        ["Asked", when(row.ts)], ["Took", `${ms(row.total_ms)}, first byte after ${ms(row.ttft_ms)}`],
        ["Reason", row.reason && el("a", { href: "#/docs/verdicts" }, words(row.reason))],
        ["Model", row.model_served && row.model_served !== row.model_requested
          ? `${row.model_requested}, answered by ${row.model_served}` : row.model_requested],
        ["Upstream", row.upstream], ["Status", row.status], ["Similarity", row.similarity?.toFixed(4)],
        ["Entry", row.entry_id && el("a", { href: `#/entries/${row.entry_id}` }, String(row.entry_id))],
        ["Tokens in / out", row.in_tok === null ? null : `${count(row.in_tok)} / ${count(row.out_tok)}, ${row.usage_basis}`],
        ["Endpoint", `${row.endpoint}${row.stream ? ", streamed" : ""}`], ["Team", row.team], ["Key", row.key_id],
        ["Namespace", row.namespace], ["Tag", row.tag], ["Retry of", row.retry_of],
      ])),
    row.lookup ? lookup(row.lookup) : null,
    money(row),
    el("section", { class: "card" }, el("h2", {}, "Calls to model servers"),
      table("Calls to model servers", [
        { label: "Purpose", head: true, cell: (call) => call.purpose },
        { label: "Server and model", whole: true, cell: (call) => `${call.upstream} / ${call.model}` },
        { label: "Status", number: true, cell: (call) => call.status || "none" },
        { label: "Used", cell: (call) => (call.won ? "yes" : "no") },
        { label: "Tier", cell: (call) => call.tier },
        { label: "Tokens in / out", number: true, cell: (call) => (call.in_tok === null ? "–" : `${count(call.in_tok)} / ${count(call.out_tok)}`) },
        { label: "Cost", number: true, cell: (call) => (call.cost_basis === "unpriced"
          ? el("span", { class: "badge warn" }, "unpriced") : nusd(call.cost_nusd)) },
        { label: "Took", number: true, cell: (call) => ms(call.total_ms) },
      ], row.calls, { empty: "None: no model server was asked." })),
  );
}

// What was recorded of the lookup when it was made.
function lookup(found) {
  const { candidates, ...others } = found;
  return el("section", { class: "card" }, el("h2", {}, "How it was looked up"),
    candidates && [el("h3", {}, "Closest stored questions"), shape("Closest stored questions", candidates)],
    Object.keys(others).length > 0 && shape("More", others));
}

// Any JSON value: a list of objects as a table, an object as names and values, else text.
export function shape(caption, value) {
  if (Array.isArray(value) && value.length && value.every((one) => one && typeof one === "object" && !Array.isArray(one))) {
    const names = [...new Set(value.flatMap((one) => Object.keys(one)))];
    return table(caption, names.map((name) => ({ label: words(name), cell: (one) => plain(one[name]) })), value);
  }
  if (Array.isArray(value)) return el("p", {}, value.length ? value.map(plain).join(", ") : "none");
  if (value && typeof value === "object") {
    return facts(Object.entries(value).map(([name, inner]) => [words(name),
      name === "entry_id" && inner ? el("a", { href: `#/entries/${inner}` }, String(inner)) : plain(inner)]));
  }
  return el("p", {}, plain(value));
}

function plain(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return Number.isInteger(value) ? count(value) : String(Number(value.toPrecision(6)));
  if (Array.isArray(value)) return value.map(plain).join(", ") || "none";
  if (typeof value === "object") {
    return Object.entries(value).map(([name, inner]) => `${words(name)} ${plain(inner)}`).join(", ") || "none";
  }
  return String(value);
}

// From what it would have cost to what it did cost, step by step; the steps add up.
function money(row) {
  const head = el("h2", {}, "Money");
  if (isUnpriced(row)) {
    return el("section", { class: "card" }, head, el("p", {}, "No price is known for this model, so nothing is counted."));
  }
  const steps = [{ name: "Without ibid", from: 0, to: row.baseline_nusd, basis: row.baseline_basis },
    ...row.savings.map((step) => ({ name: step.mechanism, from: step.before_nusd, to: step.after_nusd,
      saved: step.saved_nusd, basis: step.basis })),
    { name: "Paid", from: 0, to: row.actual_nusd, basis: "" }];
  const most = Math.max(...steps.flatMap((step) => [step.from, step.to]), 1);
  const bar = (step) => {
    const place = (v) => (v / most) * 196 + 2;
    const tone = step.saved === undefined ? "tone-6" : step.saved < 0 ? "tone-3" : "tone-1";
    return svg("svg", { width: 200, height: 12, viewBox: "0 0 200 12", class: tone, "aria-hidden": "true" },
      svg("rect", { x: place(Math.min(step.from, step.to)), y: 1, height: 10, rx: 2,
        width: Math.max(Math.abs(place(step.to) - place(step.from)), 1.5) }));
  };
  return el("section", { class: "card" }, head,
    table("Money, from what it would have cost to what it did", [
      { label: "Step", whole: true, cell: (step) => step.name },
      { label: "From, to", cell: bar },
      { label: "Saved", number: true, cell: (step) => (step.saved === undefined ? "" : nusd(step.saved)) },
      { label: "Cost then", number: true, cell: (step) => nusd(step.to) },
      { label: "Known as", cell: (step) => step.basis || "–" },
    ], steps),
    el("p", { class: "quiet" }, row.baseline_nusd
      ? `${usd((row.baseline_nusd - row.actual_nusd) / 1e9)} saved, ${share((row.baseline_nusd - row.actual_nusd) / row.baseline_nusd)} of what it would have cost.`
      : "Nothing would have been paid without ibid."));
}
